"""Triton for pages on a CUDA device, the reference for everything else.

``LCGUARD_OPS=reference`` or ``triton`` forces one. Forcing Triton on CPU tensors works under
``TRITON_INTERPRET=1``, set before Triton is imported: slow, for tests. A work that no kernel is
made for (``NotImplementedError``) goes to the reference unless Triton is forced.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from torch import Tensor

from lcguard.ops import reference
from lcguard.ops.work import TokenWork
from lcguard.rope import Rotary

CHOICE = "LCGUARD_OPS"


def choose(*paged: Tensor) -> str:
    """Which implementation: triton or reference. A kernel wants the last dimension dense.

    Raises:
        ValueError: another value of ``LCGUARD_OPS``.
        RuntimeError: Triton is forced where it cannot run.
    """
    forced = os.environ.get(CHOICE, "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"{CHOICE}={forced!r} is neither 'reference' nor 'triton'")
    if forced == "reference":
        return forced
    on_cuda = all(t.is_cuda for t in paged)
    found = importlib.util.find_spec("triton") is not None
    if forced:
        if not found:
            raise RuntimeError(f"{CHOICE}=triton: the package triton is not installed")
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"{CHOICE}=triton needs CUDA tensors, these are on {paged[0].device}: unset it, or "
                "set TRITON_INTERPRET=1 before Triton is imported"
            )
        return forced
    return "triton" if on_cuda and found and all(t.stride(-1) == 1 for t in paged) else "reference"


def rewrite_layer(
    k_view: Tensor,
    v_view: Tensor,
    slots: Tensor,
    rotary: Rotary,
    start: int,
    work: TokenWork,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    """See ``reference.rewrite_layer``; errors also as in ``choose``."""
    paged = k_view, v_view, out_keys, out_values
    args = k_view, v_view, slots, rotary, start, work, out_keys, out_values
    if not _by_kernel("rewrite_layer", paged, args):
        reference.rewrite_layer(*args)


def place_layer(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rotary: Rotary,
    offset: int,
    k_view: Tensor,
    v_view: Tensor,
) -> None:
    """See ``reference.place_layer``; errors also as in ``choose``."""
    args = keys, values, slots, rotary, offset, k_view, v_view
    if not _by_kernel("place_layer", (keys, values, k_view, v_view), args):
        reference.place_layer(*args)


def _by_kernel(name: str, paged: tuple[Tensor, ...], args: tuple[Any, ...]) -> bool:
    """True where Triton did it."""
    if choose(*paged) != "triton":
        return False
    from lcguard.ops import kv_rewrite

    try:
        getattr(kv_rewrite, name)(*args)
    except NotImplementedError:
        if os.environ.get(CHOICE):
            raise
        return False
    return True
