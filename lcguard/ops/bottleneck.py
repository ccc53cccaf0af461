"""Triton kernel for the residual guard, whose bottleneck sees all heads of a token.

    z' = z + up(gelu(down(layer_norm(z) * gain + bias) + down_bias)) + up_bias

A program reads its rows three times, the second and third out of cache: for mean and variance, for
the product with ``down``, and for the one with ``up``.
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
    noisy,
    page_rows,
    standardised,
    turn_of,
    write,
)


@triton.jit
def _bottleneck(
    pages: Pages,
    out: Segment,
    places: Places,
    turn: Turn,
    stats,
    net,
    noise: Noise,
    H: tl.constexpr,
    D: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    NOISE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KV: tl.constexpr,
):
    W: tl.constexpr = H * D
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    known = r < R
    row, live = page_rows(pages, places, tokens, N)
    gain, bias, down, down_bias, up, up_bias = net
    # Mean and sum of squares, a few channels at a time (Chan's update: nothing cancels).
    seen = 0.0
    mean = tl.zeros([BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < D
        n = tl.sum(inside.to(tl.float32), 0)
        turned = turn_of(turn, places, tokens, c, R2, KV == 0)
        for i in range(H):
            head = tl.to_tensor(i).to(tl.int64)
            z, _, _ = standardised(pages, row, live, head, c, inside, turned, stats, H, D, R2, KV)
            own = tl.sum(tl.where(inside[None, :], z, 0.0), 1) / n
            off = tl.where(inside[None, :], z - own[:, None], 0.0)
            delta = own - mean
            squares += tl.sum(off * off, 1) + delta * delta * (n * seen / (seen + n))
            mean += delta * (n / (seen + n))
            seen += n
    rate = 1.0 / tl.sqrt(squares / W + 1e-5)
    hidden = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < D
        turned = turn_of(turn, places, tokens, c, R2, KV == 0)
        for i in range(H):
            head = tl.to_tensor(i).to(tl.int64)
            w = KV * W + head * D + c
            z, _, _ = standardised(pages, row, live, head, c, inside, turned, stats, H, D, R2, KV)
            z = (z - mean[:, None]) * rate[:, None] * channel(gain, w, inside)
            z = tl.where(inside[None, :], z + channel(bias, w, inside), 0.0)
            mask = inside[:, None] & known[None, :]
            tile = tl.load(down + w[:, None] * R + r[None, :], mask=mask, other=0.0)
            hidden = tl.dot(z, tile, hidden, input_precision=DOT)
    hidden += channel(down_bias + KV * R, r, known)
    hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < D
        turned = turn_of(turn, places, tokens, c, R2, KV == 0)
        for i in range(H):
            head = tl.to_tensor(i).to(tl.int64)
            w = head * D + c
            z, center, scale = standardised(
                pages, row, live, head, c, inside, turned, stats, H, D, R2, KV
            )
            mask = known[:, None] & inside[None, :]
            tile = tl.load(up + (KV * R + r)[:, None] * W + w[None, :], mask=mask, other=0.0)
            z += tl.dot(hidden, tile, input_precision=DOT) + channel(up_bias + KV * W, w, inside)
            if NOISE:
                block = start // 8 + tl.arange(0, BLOCK_C // 8)
                z = noisy(z, noise, tokens, head * ((D + 7) // 8) + block, KV)
            write(out, z * scale + center, head * out.head + c, inside, tokens, places, live)


@triton.jit(do_not_specialize=VARYING)
def bottleneck_kernel(
    k_pages: Pages,  # keys [B, H, N, D] as the engine caches them: rotated
    v_pages: Pages,  # values [B, H, N, D]
    k_out: Segment,  # guarded keys [H, T, D] without position, written
    v_out: Segment,  # guarded values [H, T, D], written
    slots,  # int64 [T]: row s % N of block s // N; a negative one is padding
    n_tokens,  # T
    n_slots,  # B * N: a slot past them is padding too
    start,  # position of the first token
    turn: Turn,  # the rotation that is taken off the keys
    stats,  # (center, scale) of each channel, float32 [2, H * D] each
    net,  # (gain, bias, down, down_bias, up, up_bias) float32: as ``work.Bottleneck``
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
    R: tl.constexpr,  # width of the bottleneck
    NOISE: tl.constexpr,  # whether noise is drawn
    DOT: tl.constexpr,  # precision of products: ieee or tf32x3
    BLOCK_T: tl.constexpr,  # tokens of a tile
    BLOCK_C: tl.constexpr,  # channels of a tile
    BLOCK_R: tl.constexpr,  # R, rounded up to a power of two
):
    """Grid: (token tiles, 1, 2)."""
    places = Places(slots, n_tokens, n_slots, start)
    key = (key0, key1, key2, key3, key4, key5, key6, key7)
    noise = Noise(table, key, first, per_token, per_kind, steps, step)
    if tl.program_id(2) == 0:
        _bottleneck(
            k_pages,
            k_out,
            places,
            turn,
            stats,
            net,
            noise,
            H,
            D,
            R2,
            N,
            R,
            NOISE,
            DOT,
            BLOCK_T,
            BLOCK_C,
            BLOCK_R,
            0,
        )
    else:
        _bottleneck(
            v_pages,
            v_out,
            places,
            turn,
            stats,
            net,
            noise,
            H,
            D,
            R2,
            N,
            R,
            NOISE,
            DOT,
            BLOCK_T,
            BLOCK_C,
            BLOCK_R,
            1,
        )
