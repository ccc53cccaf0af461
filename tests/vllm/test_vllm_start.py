"""Settings and start-up checks of the connector: what needs no engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.nano.load import model_path
from lcguard.categories import CATEGORIES
from lcguard.guards.frozen import weights_digest
from lcguard.guards.shipped import guard_folder
from lcguard.handoff.gatekeeper import Gatekeeper
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.handoff.plan import ModelFacts
from lcguard.handoff.policy import load_policy
from lcguard.handoff.request import EnginePublish
from lcguard.model_digest import checkpoint_digest
from lcguard.reloading import ReloadingFile
from lcguard.store import open_store
from lcguard.vllm.checks import check_config, check_groups, check_siblings, check_version
from lcguard.vllm.errors import StartError
from lcguard.vllm.settings import policy_of, read_settings
from lcguard.vllm.setup import guards_of, key_of
from tests.fixtures import tiny_model

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
FACTS = ModelFacts(
    "m", "r" * 64, "c" * 64, {"kind": "default"}, placeholder_id=0, neutral_id=3, max_model_len=256
)


# -- settings and start


def test_settings_refuse_what_they_do_not_know() -> None:
    assert read_settings({"store": "memory://"}).guards == {}
    for bad, message in (
        ({}, "store"),
        ({"store": "memory://", "keys": "x"}, "keys"),
        ({"store": "memory://", "placeholder_id": -1}, "placeholder_id"),
    ):
        with pytest.raises(StartError, match=message):
            read_settings(bad)
    assert policy_of(read_settings({"store": "memory://"})).edges == ()
    with pytest.raises(StartError, match=r"absent\.yaml"):
        policy_of(read_settings({"store": "memory://", "policy": "absent.yaml"}))
    assert (Path(guard_folder("nano:gate")) / "lcguard_config.json").is_file()
    assert guard_folder("some/guard") == "some/guard"


def test_the_connector_needs_the_deployments_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under vLLM's own server nobody else looks for it; one line names it and the fix."""
    for text in ("", " "):
        monkeypatch.setenv(KEY_VARIABLE, text)
        with pytest.raises(StartError, match=r"^LCGUARD_KEY is not set: set it to the output of "):
            key_of()
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(StartError, match=r"^LCGUARD_KEY is not set: set it to the output of "):
        key_of()


def config(**changes: Any) -> Any:
    model = SimpleNamespace(hf_text_config=tiny_model("qwen3").config)
    parts: dict[str, Any] = {
        "kv_transfer_config": SimpleNamespace(kv_load_failure_policy="fail", kv_role="kv_both"),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "speculative_config": None,
        "model_config": model,
    }
    return SimpleNamespace(**(parts | changes))


def test_unproved_engines_do_not_start() -> None:
    check_config(config())
    check_version("0.32.0+cpu")
    transfer = SimpleNamespace
    mla = SimpleNamespace(hf_text_config=tiny_model("qwen3").config)
    mla.hf_text_config.kv_lora_rank = 8
    packed = SimpleNamespace(hf_text_config=tiny_model("qwen3").config, quantization="fp8")
    for changes, message in (
        (
            {"kv_transfer_config": transfer(kv_load_failure_policy="recompute", kv_role="kv_both")},
            "recompute",
        ),
        (
            {"kv_transfer_config": transfer(kv_load_failure_policy="fail", kv_role="kv_producer")},
            "kv_producer",
        ),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "fp8"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline_parallel_size"),
        ({"speculative_config": object()}, "speculative"),
        ({"lora_config": object()}, "lora_config: guards are made for the base model's weights"),
        ({"weight_transfer_config": object()}, "weight_transfer_config"),
        ({"kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, "kv_events_config"),
        (
            {"cache_config": SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=True)},
            "kv_sharing_fast_prefill",
        ),
        (
            {
                "cache_config": SimpleNamespace(
                    cache_dtype="auto", prefix_caching_hash_algo="xxhash"
                )
            },
            "xxhash",
        ),
        (
            {"aux_output_config": SimpleNamespace(enable_return_routed_experts=True)},
            "enable_return_routed_experts",
        ),
        ({"model_config": mla}, "multi-head latent attention"),
        ({"model_config": packed}, "quantization='fp8' changes the weights"),
    ):
        with pytest.raises(StartError, match=message):
            check_config(config(**changes))
    with pytest.raises(StartError, match=r"0\.33\.0"):
        check_version("0.33.0")


def test_hybrid_caches_and_siblings_are_refused() -> None:
    class FullAttentionSpec:
        pass

    class MambaSpec:
        pass

    def groups(*specs: Any) -> Any:
        return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s()) for s in specs])

    check_groups(groups(FullAttentionSpec))
    for bad in (groups(FullAttentionSpec, FullAttentionSpec), groups(MambaSpec), groups()):
        with pytest.raises(StartError, match="only one group of full attention"):
            check_groups(bad)
    check_siblings(["ExampleConnector", "NixlConnector"])
    check_siblings(["LCGuardConnector"])
    with pytest.raises(StartError, match="NixlConnector"):
        check_siblings(["LCGuardConnector", "NixlConnector"])


def test_a_guard_of_another_model_stops_the_start() -> None:
    settings = read_settings({"store": "memory://", "guards": {"gate": "nano:gate"}})
    nano = load_backend("nano").source.config
    facts = replace(FACTS, revision="f" * 64)
    model = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=nano))
    with pytest.raises(StartError, match=r"guards\.gate"):
        guards_of(model, settings, facts)


# -- the checkpoint's digest


def test_the_digest_of_files_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    assert checkpoint_digest(model_path()) == load_backend("nano").digest
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "llama")
    assert checkpoint_digest(tmp_path / "llama") == weights_digest(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert checkpoint_digest(tmp_path / "shards") == weights_digest(model)


def test_one_changed_weight_changes_the_digest(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "m")
    before = checkpoint_digest(tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values()))[0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert checkpoint_digest(tmp_path / "m") != before
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        checkpoint_digest(tmp_path / "m")
    with pytest.raises(ValueError, match="no safetensors"):
        checkpoint_digest(tmp_path)


def test_a_policy_file_is_followed_by_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nedges: [{source: a, audience: b, forbid: [health]}]\n")
    found = policy_of(read_settings({"store": "memory://", "policy": str(path)}))
    assert isinstance(found, ReloadingFile)
    clock = [0.0]
    policy = ReloadingFile(path, load_policy, clock=lambda: clock[0])
    keeper = Gatekeeper(FACTS, policy, ["gate"], open_store(str(tmp_path / "s")), KEY)
    wish = EnginePublish(source="a", audience="b")
    assert keeper.edge(wish).forbid == ("health",)
    path.write_text("version: 1\nedges: [{source: a, audience: b, forbid: [finance]}]\n")
    clock[0] = 2.0
    assert keeper.edge(wish).forbid == ("finance",)
    path.write_text("version: 1\nedges: nonsense\n")
    clock[0] = 4.0
    assert keeper.edge(wish).forbid == ("finance",)
    assert "edges" in policy.error


def test_a_policy_that_may_come_later_forbids_everything_until_then(tmp_path: Path) -> None:
    """As ``lcguard serve`` names it to its engine; named by hand, a missing one is a slip."""
    path = tmp_path / "policy.yaml"
    settings = {"store": "memory://", "policy": str(path)}
    with pytest.raises(StartError, match=r"policy\.yaml"):
        policy_of(read_settings(settings))
    later = policy_of(read_settings(settings | {"policy_optional": True}))
    assert isinstance(later, ReloadingFile)
    assert later.current().for_edge("a", "b").forbid == CATEGORIES
    path.write_text("version: 1\nedges: [{source: a, audience: b, forbid: [health]}]\n")
    later._next_s = 0.0
    assert later.current().for_edge("a", "b").forbid == ("health",)


def test_the_engine_and_the_proxy_look_for_the_policy_that_is_not_there(tmp_path: Path) -> None:
    from lcguard.server.engine import EnginePlan
    from lcguard.server.lifespan import policy_of as of_proxy
    from lcguard.server.settings import EngineSettings, ServerSettings

    path = tmp_path / "policy.yaml"
    plan = EnginePlan(EngineSettings(), "m", "m", str(path), "memory://x", None, tmp_path / "log")
    words = plan.command(1)
    extra = json.loads(words[words.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    for found in (of_proxy(ServerSettings(policy=path)), policy_of(read_settings(extra))):
        assert isinstance(found, ReloadingFile)
        assert found.current().edges == ()
        assert found.path == path
