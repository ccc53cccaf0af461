"""What the kernels on paged KV have in common: arguments, and tiles of ``BLOCK_T`` tokens.

Between load and store all is float32. Strides are in elements and the last dimension is dense; a
head is ``BLOCK_D`` columns, D rounded up to a power of two and masked.

H heads here, D head dim, R2 rotated channels, N rows of a block, R bottleneck, X codebook words.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lcguard.ops.chacha import draw_tile


class Pages(NamedTuple):
    """Paged keys or values ``[B, H, N, D]``."""

    data: Any
    block: int
    head: int
    row: int


class Segment(NamedTuple):
    """Keys or values ``[H, T, D]``."""

    data: Any
    head: int
    row: int


class Places(NamedTuple):
    """Which rows, and where they stand."""

    slots: Any
    """int64 ``[T]``."""
    n_tokens: int
    n_slots: int
    start: int
    """Position of the first token."""


class Turn(NamedTuple):
    """Rotation by ``sign * position * freq``, times ``scale``."""

    freq: Any
    """float32 ``[R2 / 2]``."""
    sign: float
    scale: float


class Noise(NamedTuple):
    """The grid, the law and where the cipher blocks are; see ``lcguard.noise`` for the layout."""

    table: Any
    """int64 ``[2^15]``."""

    key: Any
    """8 ints: the little-endian words of the secret, signed."""
    first: int
    """Cipher block of token 0, keys, head 0."""
    per_token: int
    per_kind: int
    steps: float
    """In one standard deviation of a channel."""
    step: float


@triton.jit
def page_rows(pages: Pages, places: Places, tokens, N: tl.constexpr):
    """Offsets int64 ``[BLOCK_T]`` of the tokens' rows in head 0, and whether there is a row."""
    slot = tl.load(places.slots + tokens, mask=tokens < places.n_tokens, other=-1)
    # The bound is for memory's sake: a slot past the end is treated as padding.
    live = (slot >= 0) & (slot < places.n_slots)
    return (slot // N) * pages.block + (slot % N) * pages.row, live


@triton.jit
def turn_of(turn: Turn, places: Places, tokens, c, R2: tl.constexpr, TURN: tl.constexpr):
    """cos and signed sin ``[BLOCK_T, columns]`` and each channel's partner: ``Rotary._turn``."""
    if TURN:
        half: tl.constexpr = R2 // 2
        low = c < half
        rate = tl.load(turn.freq + tl.where(low, c, c - half), mask=c < R2, other=0.0)
        angle = (tokens + places.start).to(tl.float32)[:, None] * rate[None, :]
        cos = tl.where((c < R2)[None, :], tl.cos(angle) * turn.scale, 1.0)
        size = turn.scale * turn.sign
        sin = tl.sin(angle) * tl.where(low, -size, size)[None, :]
        return cos, sin, tl.where(low, c + half, c - half)
    else:  # values, which ``read`` does not turn
        return c, c, c


@triton.jit
def read(data, at, mask, c, turned, R2: tl.constexpr, TURN: tl.constexpr):
    """Float32 tile at offsets ``at`` (of channel 0) plus ``c``; keys are turned."""
    x = tl.load(data + at + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if TURN:
        # Pairs are half a head apart: the second load finds the lines of the first in L1.
        both = mask & (c < R2)[None, :]
        partner = tl.load(data + at + turned[2][None, :], mask=both, other=0.0).to(tl.float32)
        x = x * turned[0] + partner * turned[1]
    return x


@triton.jit
def noisy(z, noise: Noise, tokens, column, KV: tl.constexpr):
    """``lcguard.grid.noisy`` on ``z [BLOCK_T, 8 * columns]``; column: block in a token's keys."""
    row = noise.first + tokens.to(tl.int64) * noise.per_token + KV * noise.per_kind
    counter = (row[:, None] + column[None, :]).to(tl.uint32)
    finite = tl.abs(z) < float("inf")
    at = tl.where(finite, z, 0.0) * noise.steps
    low = tl.floor(at)
    half = low * 0.5
    over = at - low  # ties to even, as torch.round
    up = (over > 0.5) | ((over == 0.5) & (half != tl.floor(half)))
    point = tl.minimum(tl.maximum(tl.where(up, low + 1.0, low), -1073741824.0), 1073741824.0)
    point = point.to(tl.int32) + draw_tile(noise.table, noise.key, counter)
    return tl.where(finite, point.to(tl.float32) * noise.step, float("nan"))


@triton.jit
def gated(
    z,
    gate,
    tokens,
    live,
    w,
    inside,
    W: tl.constexpr,
    KV: tl.constexpr,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """``(1 - g) z + g sum_w p_w c_w`` with gate = (g ``[T, 2]``, p ``[T, X]``, c ``[X, 2, W]``)."""
    x = tl.arange(0, BLOCK_X)
    g = tl.load(gate[0] + tokens * 2 + KV, mask=live, other=0.0)[:, None]
    mask = live[:, None] & (x < X)[None, :]
    p = tl.load(gate[1] + tokens[:, None] * X + x[None, :], mask=mask, other=0.0)
    mask = (x < X)[:, None] & inside[None, :]
    code = tl.load(gate[2] + (x[:, None] * 2 + KV) * W + w[None, :], mask=mask, other=0.0)
    return (1 - g) * z + g * tl.dot(p, code, input_precision="ieee")


@triton.jit
def write(out: Segment, x, at, inside, tokens, places: Places, live):
    """Stores tokens of a segment at channel offsets ``at``, zeros for padding."""
    at = tokens.to(tl.int64)[:, None] * out.row + at[None, :]
    x = tl.where(live[:, None], x, 0.0).to(out.data.dtype.element_ty)
    tl.store(out.data + at, x, mask=(tokens < places.n_tokens)[:, None] & inside[None, :])


@triton.jit
def channel(row, w, inside, other: tl.constexpr = 0.0):
    """A statistic or parameter of channels ``w``, as a row."""
    return tl.load(row + w, mask=inside, other=other)[None, :]


@triton.jit
def standardised(
    pages: Pages,
    row,
    live,
    head,
    c,
    inside,
    turned,
    stats,
    H: tl.constexpr,
    D: tl.constexpr,
    R2: tl.constexpr,
    KV: tl.constexpr,
):
    """One head's z ``[BLOCK_T, columns]``, with its statistics."""
    at = (row + head * pages.head)[:, None]
    x = read(pages.data, at, live[:, None] & inside[None, :], c, turned, R2, KV == 0)
    center = channel(stats[0] + KV * H * D, head * D + c, inside)
    scale = channel(stats[1] + KV * H * D, head * D + c, inside, 1.0)
    return (x - center) / scale, center, scale
