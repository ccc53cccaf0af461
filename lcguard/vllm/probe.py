"""``lcguard probe``: what the installed vLLM, its pages and a model support, and why not."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcguard.handoff.keys import KEY_VARIABLE, deployment_key
from lcguard.hub import quiet_hub, read_tokenizer, why_not_loaded
from lcguard.model_files import check_texts, check_weights, refuse_packed
from lcguard.vllm import TESTED_VERSIONS
from lcguard.vllm.checks import installed_version


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    ok: bool | None
    """None: nothing to say either way."""
    detail: str


def probe(model: str | None = None, engine: bool = False) -> list[Finding]:
    """Looks at machine, vLLM and, where given, a model.

    Args:
        model: folder or hub repository.
        engine: also starts an engine on the model and runs the layout probe.

    Raises ``ModelFolderError`` for a model that is damaged, without tokenizer, or packed as no
    guard can be made for.
    """
    found = [_machine(), *installed_engine(), _key()]
    if model is not None:
        found.append(model_support(model))
        if engine and all(f.ok is not False or f.what == "key" for f in found):
            found.append(_pages(model))
    return found


def _machine() -> Finding:
    if torch.cuda.is_available():
        return Finding(
            "device", True, f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
        )
    return Finding(
        "device", True, f"CPU ({platform.machine()}), torch {torch.__version__}: no CUDA device"
    )


def installed_engine(untested: str = "") -> list[Finding]:
    """vLLM's version, and whether it would load the connector. ``untested``: ``untested_vllm``."""
    found = [_vllm(untested)]
    if importlib.util.find_spec("vllm") is not None:
        found.append(_plugin())
    return found


def _vllm(untested: str) -> Finding:
    if (found := installed_version()) is not None:
        package, number = found
        plain = number.split("+")[0]
        told = f": not tested, install {' or '.join(TESTED_VERSIONS)} or set untested_vllm"
        if plain in TESTED_VERSIONS:
            told = ""
        elif plain == untested:
            told = ": not tested, untested_vllm lets it in"
        ok = plain in (*TESTED_VERSIONS, untested)
        return Finding("vllm", ok, f"{package} {number}{told}")
    return Finding(
        "vllm", False, "not installed: pip install 'lcguard[vllm]', or `make vllm` on a CPU"
    )


def _plugin() -> Finding:
    from importlib.metadata import entry_points

    names = [e.name for e in entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if "lcguard" not in names:
        return Finding("plugin", False, "entry point lcguard is missing: pip install lcguard again")
    if allowed is not None and "lcguard" not in allowed.split(","):
        return Finding(
            "plugin", False, f"VLLM_PLUGINS={allowed!r} leaves lcguard out: add it there"
        )
    return Finding("plugin", True, "vllm.general_plugins lists lcguard")


def _key() -> Finding:
    try:
        deployment_key()
    except ValueError as error:
        return Finding("key", False, str(error))
    return Finding("key", True, f"{KEY_VARIABLE} is set")


def model_support(model: str) -> Finding:
    """Whether segments of a model can be made and guarded inside vLLM.

    Raises ``ModelFolderError`` as ``probe``.
    """
    from transformers import AutoConfig

    from lcguard.cache import check_supported, kv_shape, window_tokens
    from lcguard.rope import Rotary, UnsupportedModelError

    folder = Path(model).expanduser()
    if folder.is_dir():
        check_texts(folder)
    try:
        with quiet_hub():
            found: Any = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else model)
        config = found.get_text_config()
        check_supported(config)
    except UnsupportedModelError as error:
        return Finding("model", False, str(error).splitlines()[0])
    except (OSError, ValueError) as error:
        return Finding("model", False, why_not_loaded(model, error))
    refuse_packed(found.to_dict(), model)
    if folder.is_dir():
        check_weights(folder)
    layers, heads, dim = kv_shape(config)
    window = window_tokens(config)
    detail = (
        f"{config.model_type}: {layers} layers, {heads} KV heads of {dim}, "
        f"RoPE {Rotary.from_config(config).kind}"
    )
    if window is not None:
        return Finding(
            "model",
            False,
            f"{detail}; sliding windows of {window} tokens are supported by the "
            "transformers backend alone, not inside vLLM",
        )
    with quiet_hub():
        read_tokenizer(str(folder) if folder.is_dir() else model)
    return Finding("model", True, detail)


def _pages(model: str) -> Finding:
    """Starts an engine, whose connector writes, reads back and compares before it serves."""
    from lcguard.vllm.errors import StartError
    from lcguard.vllm.llm import GuardedLLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        llm = GuardedLLM.build(model, enforce_eager=True, max_model_len=256)
    except (StartError, RuntimeError, ValueError) as error:
        return Finding("pages", False, str(error).splitlines()[-1])
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    group: Any = get_kv_transfer_group()
    layer = group.worker.pages.layers[0]
    kernel = getattr(layer.layer, "isa", None) or type(layer.layer.impl).__name__
    detail = (
        f"{tuple(layer.pages.shape)} {layer.pages.dtype}, strides {layer.pages.stride()}, "
        f"{kernel}: read back as written"
    )
    llm.engine.llm_engine.engine_core.shutdown()
    return Finding("pages", True, detail)
