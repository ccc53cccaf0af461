"""Paged KV to a guarded segment and back, in one launch per layer, by Triton.

Same arguments, errors and results as ``lcguard.ops.reference``, but that slots past the last page
are treated as padding (a check would wait for the device).

Without noise the plain path should be bound by memory; with it, by the cipher's 120 or so integer
operations per channel and a look-up in the 256 KiB of the noise's law. The grid is not persistent:
a long segment has thousands of equal programs. Tile sizes follow from what the compiler reports for
sm_90 (registers, spills); no choice here was measured on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcguard import discrete_gaussian
from lcguard.grid import step_size, steps_per_unit
from lcguard.noise import blocks_per_head
from lcguard.ops.bottleneck import bottleneck_kernel
from lcguard.ops.kernels import place_kernel, plain_kernel
from lcguard.ops.reference import check_layer, check_work
from lcguard.ops.squeeze import expand_kernel, squeeze_kernel
from lcguard.ops.tiles import Pages, Segment, Turn
from lcguard.ops.work import TokenWork
from lcguard.rope import Rotary

TILE = 2048
"""Elements of a tile: two cipher blocks for each of 128 threads, 16 registers for each value."""
MAX_D = 256
MAX_BOTTLENECK = 256
"""R that a tile holds whole."""
CHUNK = 32
"""Channels of a product's inner dimension at a time: float32 operands stay in registers."""
MANY_TILES = 256
"""Token tiles that fill the device alone: a program then takes all heads and forms angles once."""


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
    """See ``reference.rewrite_layer``.

    Raises:
        ValueError: also where the last dimension of a view or output is not dense.
        NotImplementedError: D or a bottleneck's R larger than a tile: use the reference. Nothing
            was written.
    """
    check_layer(k_view, v_view, slots, rotary, out_keys, out_values)
    check_work(work, k_view, slots)
    heads, dim = k_view.shape[1], k_view.shape[3]
    block_d = _checked_dim(dim, k_view, v_view, out_keys, out_values)
    sizes: dict[str, Any] = {"H": heads, "D": dim}
    segment: dict[str, Any] = {"k_out": _segment(out_keys), "v_out": _segment(out_values)}
    token = _places(k_view, slots, start)
    token["stats"] = work.center.contiguous(), work.scale.contiguous()
    source: dict[str, Any] = {
        **_noise(work, dim, k_view.device),
        "k_pages": _pages(k_view),
        "v_pages": _pages(v_view),
        "turn": Turn(_frequencies(rotary, k_view.device), -1.0, 1.0 / rotary.attention_scaling),
        "R2": rotary.rotary_dim,
        "N": k_view.shape[2],
        "NOISE": bool(work.noise),
    }
    n_tokens, gate = len(slots), work.gate
    # Float32 pages keep float32 products. tf32x3 is exact to about 21 bits, beyond what 16-bit
    # pages hold, and runs on tensor cores, which leave room for more tokens in a tile.
    single = torch.float32 in (k_view.dtype, out_keys.dtype)
    product: dict[str, Any] = {"DOT": "ieee" if single else "tf32x3", "BLOCK_C": CHUNK}
    block_t = 16 if single or n_tokens < MANY_TILES * 16 else 64
    if b := work.bottleneck:
        width = b.down.shape[2]
        if width > MAX_BOTTLENECK:
            raise NotImplementedError(f"bottleneck R={width} exceeds {MAX_BOTTLENECK}")
        net = b.gain, b.bias, b.down, b.down_bias, b.up, b.up_bias
        net_args = {
            "net": tuple(t.contiguous() for t in net),
            "R": width,
            "BLOCK_R": _power_of_two(width),
        }
        all_args = source | segment | token | sizes | product | net_args
        _launch(bottleneck_kernel, k_view, n_tokens, block_t, 1, all_args)
        return
    words = gate.words.shape[1] if gate else 1
    source |= {"X": words, "BLOCK_X": _power_of_two(words), "gate": None}
    if gate:
        source["gate"] = tuple(t.contiguous() for t in (gate.closed, gate.words, gate.codebook))
    if gate and gate.squeeze is not None and gate.expand is not None:
        y = torch.empty(2, n_tokens, heads * dim, device=k_view.device)
        tiles = heads * _tiles(dim, CHUNK)
        shared = token | sizes | product | {"y": y}
        first, last = ({"matrix": m.contiguous()} for m in (gate.squeeze, gate.expand))
        _launch(squeeze_kernel, k_view, n_tokens, block_t, tiles, source | shared | first)
        _launch(expand_kernel, k_view, n_tokens, block_t, tiles, segment | shared | last)
        return
    block_t = TILE // block_d
    per_program = heads if _tiles(n_tokens, block_t) >= MANY_TILES else 1
    choice = {
        "HEADS": per_program,
        "BLOCK_D": block_d,
        "GATE": gate is not None,
        "CHANGES": not work.passes,
    }
    all_args = source | segment | token | sizes | choice
    _launch(plain_kernel, k_view, n_tokens, block_t, heads // per_program, all_args)


def place_layer(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rotary: Rotary,
    offset: int,
    k_view: Tensor,
    v_view: Tensor,
) -> None:
    """See ``reference.place_layer``; errors also as in ``rewrite_layer``."""
    check_layer(k_view, v_view, slots, rotary, keys, values)
    heads, dim = k_view.shape[1], k_view.shape[3]
    block_d = _checked_dim(dim, k_view, v_view, keys, values)
    block_t = TILE // block_d
    per_program = heads if _tiles(len(slots), block_t) >= MANY_TILES else 1
    args = {
        "k_segment": _segment(keys),
        "v_segment": _segment(values),
        "k_pages": _pages(k_view),
        "v_pages": _pages(v_view),
        **_places(k_view, slots, offset),
        "turn": Turn(_frequencies(rotary, k_view.device), 1.0, rotary.attention_scaling),
        "D": dim,
        "R2": rotary.rotary_dim,
        "N": k_view.shape[2],
        "HEADS": per_program,
        "BLOCK_D": block_d,
    }
    _launch(place_kernel, k_view, len(slots), block_t, heads // per_program, args)


def _launch(
    kernel: Any, on: Tensor, n_tokens: int, block_t: int, columns: int, args: dict[str, Any]
) -> None:
    if n_tokens:
        grid = _tiles(n_tokens, block_t), columns, 2
        with torch.cuda.device_of(on):
            # named, because Triton 3.10 changes the default
            kernel[grid](**args, BLOCK_T=block_t, enable_fp_fusion=True)


def _tiles(n: int, block: int) -> int:
    return -(-n // block)  # triton.cdiv says the same twenty times slower


def _power_of_two(n: int) -> int:
    """The next one, at least the 16 that a product and a cipher block need."""
    return max(16, 1 << (n - 1).bit_length())


def _checked_dim(dim: int, *dense: Tensor) -> int:
    """``BLOCK_D``."""
    if dim > MAX_D:
        raise NotImplementedError(f"D={dim} exceeds {MAX_D}")
    for tensor in dense:
        if tensor.stride(-1) != 1:
            raise ValueError(f"strides {tensor.stride()}: a kernel needs the last dimension dense")
    return _power_of_two(dim)


def _pages(view: Tensor) -> Pages:
    return Pages(view, *view.stride()[:3])


def _segment(tensor: Tensor) -> Segment:
    return Segment(tensor, *tensor.stride()[:2])


def _places(view: Tensor, slots: Tensor, start: int) -> dict[str, Any]:
    return {
        "slots": slots.contiguous(),
        "n_tokens": len(slots),
        "n_slots": view.shape[0] * view.shape[2],
        "start": start,
    }


def _noise(work: TokenWork, dim: int, device: torch.device) -> dict[str, Any]:
    words, first, per_token, per_kind, table = [0] * 8, 0, 0, 0, None
    steps, step = 0.0, 0.0
    if work.noise and (stream := work.stream):
        a_head = blocks_per_head(dim)
        per_token, per_kind = stream.blocks_per_token(dim), stream.heads * a_head
        first = stream.first_token * per_token + stream.layer * 2 * per_kind
        first += stream.first_head * a_head
        # Arguments of the launch, not a tensor: the allocator would keep the secret.
        words = np.frombuffer(stream.key, dtype="<i4").tolist()
        steps, step, table = steps_per_unit(work.noise), step_size(work.noise), _table(device)
    key = {f"key{i}": word for i, word in enumerate(words)}
    return key | {
        "table": table,
        "first": first,
        "per_token": per_token,
        "per_kind": per_kind,
        "steps": steps,
        "step": step,
    }


@lru_cache(maxsize=16)
def _table(device: torch.device) -> Tensor:
    return torch.from_numpy(discrete_gaussian.table().view(np.int64)).to(device)


@lru_cache(maxsize=16)
def _frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    return torch.tensor(rotary.inv_freq, dtype=torch.float32, device=device)
