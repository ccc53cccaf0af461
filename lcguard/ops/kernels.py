"""Triton kernels on paged KV that move bytes: rewrite head by head, and place.

Heads share an angle's cosine. The last grid axis is keys or values, so that the branch on it is
uniform.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

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
    read,
    turn_of,
    write,
)

VARYING = ["n_tokens", "n_slots", "start", "first", *(f"key{i}" for i in range(8))]
"""Never specialised: a kernel for one key would be compiled anew for each segment. These are plain
arguments because Triton specialises what is inside a tuple."""


@triton.jit
def _plain(
    pages: Pages,
    out: Segment,
    places: Places,
    turn: Turn,
    stats,
    gate,
    noise: Noise,
    H: tl.constexpr,
    D: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    X: tl.constexpr,
    CHANGES: tl.constexpr,
    GATE: tl.constexpr,
    NOISE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    KV: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_D)
    inside = c < D
    row, live = page_rows(pages, places, tokens, N)
    turned = turn_of(turn, places, tokens, c, R2, KV == 0)
    for i in range(HEADS):
        head = (tl.program_id(1) * HEADS + i).to(tl.int64)
        at = (row + head * pages.head)[:, None]
        x = read(pages.data, at, live[:, None] & inside[None, :], c, turned, R2, KV == 0)
        if CHANGES:
            w = head * D + c
            center = channel(stats[0] + KV * H * D, w, inside)
            scale = channel(stats[1] + KV * H * D, w, inside, 1.0)
            z = (x - center) / scale
            if GATE:
                z = gated(z, gate, tokens, live, w, inside, H * D, KV, X, BLOCK_X)
            if NOISE:
                column = head * ((D + 7) // 8) + tl.arange(0, BLOCK_D // 8)
                z = noisy(z, noise, tokens, column, KV)
            x = z * scale + center
        write(out, x, head * out.head + c, inside, tokens, places, live)


@triton.jit(do_not_specialize=VARYING)
def plain_kernel(
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
    gate,  # (g [T, 2], p [T, X], c [X, 2, H * D]) float32; None without GATE
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
    CHANGES: tl.constexpr,  # False: what is read is written, and nothing is rounded
    GATE: tl.constexpr,  # whether entries are replaced
    NOISE: tl.constexpr,  # whether noise is drawn
    HEADS: tl.constexpr,  # heads of one program
    BLOCK_T: tl.constexpr,  # tokens of a tile
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two
    BLOCK_X: tl.constexpr,  # X, rounded up to a power of two
):
    """Guards that treat a head alone: identity, gaussian, a gate without squeeze.

    Grid: (token tiles, H / HEADS, 2). stats: center, scale ``[2, H * D]``; gate: see ``gated``.
    """
    places = Places(slots, n_tokens, n_slots, start)
    key = (key0, key1, key2, key3, key4, key5, key6, key7)
    noise = Noise(table, key, first, per_token, per_kind, steps, step)
    if tl.program_id(2) == 0:
        _plain(
            k_pages,
            k_out,
            places,
            turn,
            stats,
            gate,
            noise,
            H,
            D,
            R2,
            N,
            X,
            CHANGES,
            GATE,
            NOISE,
            HEADS,
            BLOCK_T,
            BLOCK_D,
            BLOCK_X,
            0,
        )
    else:
        _plain(
            v_pages,
            v_out,
            places,
            turn,
            stats,
            gate,
            noise,
            H,
            D,
            R2,
            N,
            X,
            CHANGES,
            GATE,
            NOISE,
            HEADS,
            BLOCK_T,
            BLOCK_D,
            BLOCK_X,
            1,
        )


@triton.jit
def _place(
    segment: Segment,
    pages: Pages,
    places: Places,
    turn: Turn,
    D: tl.constexpr,
    R2: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_D)
    row, live = page_rows(pages, places, tokens, N)
    mask = live[:, None] & (c < D)[None, :]
    turned = turn_of(turn, places, tokens, c, R2, KV == 0)
    for i in range(HEADS):
        head = (tl.program_id(1) * HEADS + i).to(tl.int64)
        at = (tokens.to(tl.int64) * segment.row + head * segment.head)[:, None]
        x = read(segment.data, at, mask, c, turned, R2, KV == 0)
        at = (row + head * pages.head)[:, None] + c[None, :]
        tl.store(pages.data + at, x.to(pages.data.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING[:3])
def place_kernel(
    k_segment: Segment,  # keys [H, T, D] without position
    v_segment: Segment,  # values [H, T, D]
    k_pages: Pages,  # keys [B, H, N, D], written rotated
    v_pages: Pages,  # values [B, H, N, D], written
    slots,  # int64 [T]: row s % N of block s // N; a negative one is padding
    n_tokens,  # T
    n_slots,  # B * N: a slot past them is padding too
    start,  # position of the first token
    turn: Turn,  # the rotation that is put on the keys
    D: tl.constexpr,  # channels of a head
    R2: tl.constexpr,  # channels of a head that rotate
    N: tl.constexpr,  # rows of a block
    HEADS: tl.constexpr,  # heads of one program
    BLOCK_T: tl.constexpr,  # tokens of a tile
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two
):
    """Rotates a segment's keys and writes it into pages. Grid: (token tiles, H / HEADS, 2)."""
    places = Places(slots, n_tokens, n_slots, start)
    if tl.program_id(2) == 0:
        _place(k_segment, k_pages, places, turn, D, R2, N, HEADS, BLOCK_T, BLOCK_D, 0)
    else:
        _place(v_segment, v_pages, places, turn, D, R2, N, HEADS, BLOCK_T, BLOCK_D, 1)
