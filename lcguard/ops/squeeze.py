"""Triton kernels for a gate whose matrices mix all W channels of a token.

    y = [(1 - g) z A + g sum_w p_w c_w] + sigma n      ``squeeze_kernel``
    x = (y B) * scale + center                         ``expand_kernel``

Two launches with y ``[2, T, W]`` float32 between them: any W, and no W x W tile. A program makes
``BLOCK_C`` channels of one head from all channels, which it reads again out of cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from lcguard.ops.kernels import VARYING
from lcguard.ops.tiles import (
    Noise,
    Pages,
    Places,
    Segment,
    Turn,
    channel,
    gated,
    noisy,
    page_rows,
    standardised,
    turn_of,
    write,
)


@triton.jit
def own_columns(D: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's head, its channels there, and their place among W."""
    per_head: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    head = tl.program_id(1) // per_head
    start = tl.program_id(1) % per_head * BLOCK_C
    c = start + tl.arange(0, BLOCK_C)
    return head, start, c, head * D + c


@triton.jit
def _squeeze(
    pages: Pages,
    y,
    places: Places,
    turn: Turn,
    stats,
    gate,
    matrix,
    noise: Noise,
    H: tl.constexpr,
    D: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    X: tl.constexpr,
    NOISE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    KV: tl.constexpr,
):
    W: tl.constexpr = H * D
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, live = page_rows(pages, places, tokens, N)
    head, start, c, w = own_columns(D, BLOCK_C)
    inside = c < D
    z = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, D, BLOCK_C):
        d = first + tl.arange(0, BLOCK_C)
        known = d < D
        turned = turn_of(turn, places, tokens, d, R2, KV == 0)
        for i in range(H):
            other = tl.to_tensor(i).to(tl.int64)
            raw, _, _ = standardised(pages, row, live, other, d, known, turned, stats, H, D, R2, KV)
            mask = known[:, None] & inside[None, :]
            at = (KV * W + other * D + d)[:, None] * W + w[None, :]
            tile = tl.load(matrix + at, mask=mask, other=0.0)
            z = tl.dot(raw, tile, z, input_precision=DOT)
    z = gated(z, gate, tokens, live, w, inside, W, KV, X, BLOCK_X)
    if NOISE:
        block = head * ((D + 7) // 8) + start // 8 + tl.arange(0, BLOCK_C // 8)
        z = noisy(z, noise, tokens, block, KV)
    at = (KV * places.n_tokens + tokens).to(tl.int64)[:, None] * W + w[None, :]
    tl.store(y + at, z, mask=(tokens < places.n_tokens)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=VARYING)
def squeeze_kernel(
    k_pages: Pages,  # keys [B, H, N, D] as the engine caches them: rotated
    v_pages: Pages,  # values [B, H, N, D]
    y,  # [2, T, H * D] float32, written: keys, then values
    slots,  # int64 [T]: row s % N of block s // N; a negative one is padding
    n_tokens,  # T
    n_slots,  # B * N: a slot past them is padding too
    start,  # position of the first token
    turn: Turn,  # the rotation that is taken off the keys
    stats,  # (center, scale) of each channel, float32 [2, H * D] each
    gate,  # (g [T, 2], p [T, X], c [X, 2, H * D]) float32; None without GATE
    matrix,  # A [2, H * D, H * D] float32
    table,  # int64 [2^15], the law of the noise; None without NOISE
    first,  # cipher block of token 0, keys, head 0
    key0,  # key0 to key7: the secret's little-endian words, signed
    key1,
    key2,
    key3,
    key4,
    key5,
    key6,
    key7,
    per_token,  # cipher blocks of a token: of all layers, keys, values and heads
    per_kind,  # cipher blocks of a token's keys in one layer, and of its values
    steps,  # grid steps in one standard deviation of a channel
    step,  # a grid step in standard deviations: 1 / steps
    H: tl.constexpr,  # KV heads
    D: tl.constexpr,  # channels of a head
    R2: tl.constexpr,  # channels of a head that rotate
    N: tl.constexpr,  # rows of a block
    X: tl.constexpr,  # words of the codebook
    NOISE: tl.constexpr,  # whether noise is drawn
    DOT: tl.constexpr,  # precision of products: ieee or tf32x3
    BLOCK_T: tl.constexpr,  # tokens of a tile
    BLOCK_C: tl.constexpr,  # channels of a tile
    BLOCK_X: tl.constexpr,  # X, rounded up to a power of two
):
    """Grid: (token tiles, H * ceil(D / BLOCK_C), 2)."""
    places = Places(slots, n_tokens, n_slots, start)
    key = (key0, key1, key2, key3, key4, key5, key6, key7)
    noise = Noise(table, key, first, per_token, per_kind, steps, step)
    if tl.program_id(2) == 0:
        _squeeze(
            k_pages,
            y,
            places,
            turn,
            stats,
            gate,
            matrix,
            noise,
            H,
            D,
            R2,
            N,
            X,
            NOISE,
            DOT,
            BLOCK_T,
            BLOCK_C,
            BLOCK_X,
            0,
        )
    else:
        _squeeze(
            v_pages,
            y,
            places,
            turn,
            stats,
            gate,
            matrix,
            noise,
            H,
            D,
            R2,
            N,
            X,
            NOISE,
            DOT,
            BLOCK_T,
            BLOCK_C,
            BLOCK_X,
            1,
        )


@triton.jit
def _expand(
    y,
    out: Segment,
    places: Places,
    stats,
    matrix,
    H: tl.constexpr,
    D: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    KV: tl.constexpr,
):
    W: tl.constexpr = H * D
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ours = tokens < places.n_tokens
    live = tl.load(places.slots + tokens, mask=ours, other=-1)
    live = (live >= 0) & (live < places.n_slots)
    head, _, c, w = own_columns(D, BLOCK_C)
    inside = c < D
    z = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    row = (KV * places.n_tokens + tokens).to(tl.int64)[:, None] * W
    for first in range(0, W, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        part = tl.load(y + row + j[None, :], mask=ours[:, None] & (j < W)[None, :], other=0.0)
        mask = (j < W)[:, None] & inside[None, :]
        tile = tl.load(matrix + (KV * W + j)[:, None] * W + w[None, :], mask=mask, other=0.0)
        z = tl.dot(part, tile, z, input_precision=DOT)
    z = z * channel(stats[1] + KV * W, w, inside) + channel(stats[0] + KV * W, w, inside)
    write(out, z, head.to(tl.int64) * out.head + c, inside, tokens, places, live)


@triton.jit(do_not_specialize=VARYING[:3])
def expand_kernel(
    y,  # [2, T, H * D] float32, of ``squeeze_kernel``
    k_out: Segment,  # guarded keys [H, T, D] without position, written
    v_out: Segment,  # guarded values [H, T, D], written
    slots,  # int64 [T]: row s % N of block s // N; a negative one is padding
    n_tokens,  # T
    n_slots,  # B * N: a slot past them is padding too
    start,  # position of the first token
    stats,  # (center, scale) of each channel, float32 [2, H * D] each
    matrix,  # B [2, H * D, H * D] float32
    H: tl.constexpr,  # KV heads
    D: tl.constexpr,  # channels of a head
    DOT: tl.constexpr,  # precision of products: ieee or tf32x3
    BLOCK_T: tl.constexpr,  # tokens of a tile
    BLOCK_C: tl.constexpr,  # channels of a tile
):
    """Grid as ``squeeze_kernel``."""
    places = Places(slots, n_tokens, n_slots, start)
    if tl.program_id(2) == 0:
        _expand(y, k_out, places, stats, matrix, H, D, DOT, BLOCK_T, BLOCK_C, 0)
    else:
        _expand(y, v_out, places, stats, matrix, H, D, DOT, BLOCK_T, BLOCK_C, 1)
