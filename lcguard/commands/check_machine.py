"""``lcguard doctor`` on the machine: Python, packages, extras, memory and processor.

What is supported is what the package says of itself: its own requirements, and the versions of vLLM
that its connector was run against.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement

from lcguard.commands.checks import Advice, Check

PACKAGE = "lcguard"
EXTRAS = {
    "server": "the proxy, lcguard serve",
    "vllm": "vLLM itself",
    "store": "stores on Redis or Valkey",
    "postgres": "the database of several proxies",
    "pii": "edges with detect: presidio",
    "real": "making the model smollm2, which detect: lcguard and examples read with",
    "client": "lcguard.client",
    "otel": "traces of the proxy's requests, where OTEL_* variables ask for them",
    "ray": "lcguard eval run --executor ray",
    "eval": "probes and charts of evaluations",
}
"""What each is for; those for developing LCGuard are left out."""
GIB = 2**30
_SHOWN = ("torch", "transformers")


def package_checks(python: str = platform.python_version()) -> dict[str, Check]:
    """Python and all packages that LCGuard cannot do without."""
    return {"python": lambda: _python(python), "packages": _packages}


def _python(found: str) -> str:
    wanted = Requirement(f"python{metadata(PACKAGE)['Requires-Python'] or ''}").specifier
    if not wanted.contains(found, prereleases=True):
        raise ValueError(f"{found}, {PACKAGE} takes {wanted}: install it under such a Python")
    return found


def _packages() -> str:
    wrong = list(unmet(""))
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: pip install {PACKAGE} again")
    return ", ".join(f"{name} {version(name)}" for name in _SHOWN)


def unmet(extra: str) -> Iterator[str]:
    """What is missing, or of another version than an extra takes; of ``""`` what all need."""
    for text in requires(PACKAGE) or ():
        wanted = Requirement(text)
        if not _asks(wanted, extra):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield f"{wanted.name} is missing"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} {found} is not {wanted.specifier}"


def _asks(wanted: Requirement, extra: str) -> bool:
    """Whether it is this extra that asks for it; of ``""`` whether all do."""
    marker = wanted.marker
    always = marker is None or marker.evaluate({"extra": ""})
    return (
        always if not extra else not always and bool(marker and marker.evaluate({"extra": extra}))
    )


def missing_extras() -> dict[str, str]:
    """Extra -> what of it is not there, as it should be. Of vLLM there are two builds, which
    ``lcguard.vllm.probe`` tells apart."""
    found = {name: "; ".join(unmet(name)) for name in EXTRAS if name != "vllm"}
    return {name: why for name, why in found.items() if why}


def check_extras(needed: Mapping[str, str], missing: Mapping[str, str]) -> str:
    """``needed``: extra -> what of the deployment needs it. Raises ``ValueError``."""
    wanted = {name: why for name, why in needed.items() if name in missing}
    if wanted:
        told = "; ".join(f"{why} needs it: {missing[name]}" for name, why in wanted.items())
        raise ValueError(f"{told}: pip install '{PACKAGE}[{','.join(wanted)}]'")
    absent = [f"{name} ({EXTRAS[name]})" for name in missing]
    return "all there" if not absent else f"not installed, nor needed here: {', '.join(absent)}"


def memory_bytes(root: Path = Path("/")) -> int | None:
    """What may still be taken: the machine's, or of the control group that this runs in, if that
    is less. None where the system does not say."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        (free,) = (int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        most, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        return free if most == "max" else min(free, max(0, int(most) - int(used)))
    except (OSError, ValueError):
        return free


def check_memory(free: int | None, model_bytes: int, cache_gib: str, default_gib: str) -> str:
    """Whether vLLM's CPU engine finds room for a model and for its cache.

    Args:
        cache_gib: as ``VLLM_CPU_KVCACHE_SPACE`` has it; empty: ``default_gib``.

    Raises ``ValueError`` for what does not fit, ``Advice`` where it is tight.
    """
    name, text = "VLLM_CPU_KVCACHE_SPACE", cache_gib or default_gib
    if not text.isdecimal() or text == "0":
        raise ValueError(f"{name}={text!r}: write whole GiB, at least 1")
    asked = int(text) * GIB + model_bytes
    told = f"{name}={text}" + ("" if cache_gib else " (unset: set so by lcguard serve)")
    told += f" and weights of {model_bytes / GIB:.1f} GiB"
    if free is None:
        return f"{told}; this system does not say how much is free"
    told += f", {free / GIB:.1f} GiB are free"
    if asked > free:
        raise ValueError(f"{told}: lower {name}, free memory or take a smaller model")
    if asked > 0.8 * free:
        raise Advice(f"{told}: little is left for what vLLM computes with; lower {name}")
    return told


def check_processor(bf16: str, args: Sequence[str]) -> str:
    """What vLLM's CPU engine computes with.

    Args:
        bf16: instructions of the processor for it; empty: none.
        args: what the engine is told. Raises ``Advice`` where it would compute slowly.
    """
    if bf16:
        return f"bfloat16 by {bf16}"
    words = [word for arg in args for word in arg.split("=", 1)]
    told = [b for a, b in pairwise(words) if a == "--dtype"]
    if told[-1:] in (["float32"], ["float"]):
        return "no instructions for bfloat16; the engine is told to compute in float32"
    raise Advice(
        "no instructions for bfloat16, which is emulated, slowly: "
        '--set \'engine.args=["--dtype", "float32"]\' where there is memory for it'
    )
