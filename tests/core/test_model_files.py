"""A model folder that is not what it seems: one line with the file and the fix, everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.nano.load import model_path
from lcguard.cli import main
from lcguard.commands.keys import new_key
from lcguard.guards import FrozenGuard
from lcguard.model_digest import checkpoint_digest
from lcguard.model_files import INDEX, SINGLE, ModelFolderError, check_readable, weight_files
from lcguard.vllm.llm import GuardedLLM
from lcguard.vllm.probe import probe
from tests.engine import HAS_VLLM, needs_vllm
from tests.fixtures import tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4\n".format("0" * 64)
Damage = Callable[[Path], object]


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path(), tmp_path / "nano"))


def cut(name: str) -> Damage:
    def damage(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 2])

    return damage


def write(name: str, content: str | bytes) -> Damage:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def configure(**keys: object) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))

    return damage


def only(name: str) -> Damage:
    return lambda folder: (folder / SINGLE).rename(folder / name)


def shards(folder: Path) -> None:
    """An index that names a file which is not there."""
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


DAMAGED: dict[str, tuple[Damage, str]] = {
    "weights are a pointer": (write(SINGLE, POINTER), "model.safetensors is a pointer of Git LFS"),
    "tokenizer is a pointer": (write("tokenizer.json", POINTER), "tokenizer.json is a pointer"),
    "configuration is a pointer": (write("config.json", POINTER), "config.json is a pointer"),
    "weights cut off": (cut(SINGLE), "model.safetensors is cut off or damaged"),
    "no weights at all": (write(SINGLE, b""), "model.safetensors is cut off or damaged"),
    "tokenizer cut off": (cut("tokenizer.json"), "tokenizer.json is cut off or damaged"),
    "configuration cut off": (cut("config.json"), "config.json is cut off or damaged"),
    "configuration a list": (write("config.json", "[]"), "config.json is no JSON object"),
    "configuration not UTF-8": (write("config.json", b"\xff\xfe{}"), "config.json is not UTF-8"),
    "template not UTF-8": (write("chat_template.jinja", b"\xe9"), "is not UTF-8 text (byte 0)"),
    "GGUF alone": (only("m.gguf"), "has GGUF weights alone (m.gguf)"),
    "pickle alone": (only("pytorch_model.bin"), "has PyTorch weights alone (pytorch_model.bin)"),
    "other safetensors alone": (only("other.safetensors"), "has no safetensors weights (model.saf"),
    "shard missing": (shards, "model-00002-of-00002.safetensors is missing"),
    "other file named": (configure(transformers_weights="x.gguf"), "'x.gguf' is read by"),
}
UNFIT: dict[str, tuple[Damage, str]] = {
    "GPTQ": (configure(quantization_config={"quant_method": "gptq"}), "(quant_method gptq)"),
    "unknown packing": (configure(quantization_config={}), "(quant_method unknown)"),
    "adapter": (write("adapter_config.json", "{}"), "has an adapter beside the weights"),
}


def refusal(capfd: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command says that ends in 2: one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lcguard", *command])
        assert main() == 2
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize("case", [*DAMAGED, *UNFIT])
def test_one_line_and_exit_2(case: str, nano: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, reason = (DAMAGED | UNFIT)[case]
    damage(nano)
    for command in (["probe"], ["explain", "Ann Lee."]):
        line = refusal(capfd, *command, "--model", str(nano))
        assert reason in line
        assert str(nano) in line


@pytest.mark.parametrize("case", DAMAGED)
def test_an_engine_is_not_started_on_it(
    case: str, nano: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, reason = DAMAGED[case]
    damage(nano)
    with pytest.raises(ModelFolderError) as caught:
        check_readable(nano)
    assert reason in str(caught.value)
    if HAS_VLLM:
        with pytest.raises(ModelFolderError):
            GuardedLLM.build(str(nano))
        state = tmp_path / "state"
        new_key(state / "keys.yaml", "intake")
        command = ["serve", "--dir", str(state), "--set", f"engine.model={nano}", "--port", "0"]
        assert reason in refusal(capfd, *command)


def test_a_sound_folder_passes(nano: Path) -> None:
    check_readable(nano)
    assert weight_files(nano) == [nano / SINGLE]
    assert {f.what: f.ok for f in probe(str(nano))}["model"]


def test_packed_weights_can_be_served_and_no_guard_made(nano: Path) -> None:
    UNFIT["GPTQ"][0](nano)
    check_readable(nano)
    with pytest.raises(ValueError, match="has packed weights"):
        load_backend(str(nano))


# -- the digest


def beside(folder: Path) -> None:
    """What folders hold besides: an adapter's weights, Mistral's own format, another precision."""
    other = {"base_model.model.x": torch.ones(2)}
    for name in ("adapter_model", "consolidated", "model.fp32-00001-of-00001"):
        save_file(other, folder / f"{name}.safetensors", metadata={"format": "pt"})


def extra(folder: Path) -> None:
    """Keys that no model of today has, and a precision of its own for some."""
    weights = load_file(folder / SINGLE)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    norms = {k: v.to(torch.float64) for k, v in weights.items() if k.endswith("norm.weight")}
    assert norms
    save_file(weights | norms, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [beside, extra])
def test_a_guard_is_at_home_in_the_folder_it_was_made_in(change: Damage, nano: Path) -> None:
    change(nano)
    backend = load_backend(str(nano))
    # what an engine reads off the files is what the guard was bound to
    assert checkpoint_digest(nano) == backend.digest
    guard = FrozenGuard.from_pretrained("nano:gate").with_card(model_digest=backend.digest)
    guard.save_pretrained(nano.parent / "guard")
    FrozenGuard.from_pretrained(nano.parent / "guard", model_digest=checkpoint_digest(nano))


def test_files_beside_the_weights_do_not_change_the_digest(nano: Path) -> None:
    before = checkpoint_digest(nano)
    assert FrozenGuard.from_pretrained("nano:gate").card.model_digest == before
    beside(nano)
    assert checkpoint_digest(nano) == before
    extra(nano)
    assert checkpoint_digest(nano) != before


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    beside(tmp_path / "many")
    assert len(weight_files(tmp_path / "many")) > 1
    assert checkpoint_digest(tmp_path / "many") == checkpoint_digest(tmp_path / "one")
    first, second = weight_files(tmp_path / "many")[:2]
    both = load_file(first) | load_file(second)
    save_file(both, first, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"stands in model-.* and in .*: keep one"):
        checkpoint_digest(tmp_path / "many")


@needs_vllm
def test_vllm_is_held_to_the_same_files(nano: Path) -> None:
    from vllm.config.load import LoadConfig

    from lcguard.model_files import AS_TRANSFORMERS
    from lcguard.vllm.errors import StartError
    from lcguard.vllm.weights import loaded_folder

    def check(load_format: str, folder: Path = nano) -> None:
        assert loaded_folder(LoadConfig(load_format=load_format), str(folder)) == folder

    for load_format in ("auto", "hf", "safetensors"):
        check(load_format, model_path())
    with pytest.raises(StartError, match="load_format='dummy' was not proved"):
        check("dummy")
    beside(nano)
    # by itself vLLM would take Mistral's file alone
    with pytest.raises(StartError, match=r"consolidated.*--load-format hf --config-format hf"):
        check("auto")
    with pytest.raises(StartError, match=r"move adapter_model.safetensors out of"):
        check(AS_TRANSFORMERS["load_format"])
    weight_map = dict.fromkeys(load_file(nano / SINGLE), SINGLE)
    (nano / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    check(AS_TRANSFORMERS["load_format"])  # an index tells it


ENGINE = """
import sys
from lcguard.vllm.llm import GuardedLLM
every = {"source": "*", "audience": "*", "forbid": ["person"], "guard": "gate"}
llm = GuardedLLM.build(sys.argv[1], guards={"gate": sys.argv[2]}, dtype="float32",
                       policy={"version": 1, "edges": [every]},
                       block_size=32, max_model_len=256, enforce_eager=True)
made = llm.publish(agent="a", audience="b", prompt="The patient's name is Ann Lee.")
print("GUARD", made.guard, made.n_tokens)
"""


@needs_vllm
def test_vllm_takes_a_guard_made_in_a_folder_of_many_files(nano: Path, tmp_path: Path) -> None:
    beside(nano)
    extra(nano)
    (nano / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": SINGLE}}))
    guard = FrozenGuard.from_pretrained("nano:gate")
    guard.with_card(model_digest=load_backend(str(nano)).digest).save_pretrained(tmp_path / "g")
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(nano), str(tmp_path / "g")],
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GUARD gate " in done.stdout
