"""Triton kernels on paged KV: rewrite head by head, through the bottleneck, and place.

``plain_kernel`` and ``place_kernel`` move bytes; heads share an angle's cosine. The bottleneck sees
all heads of a token: ``bottleneck_kernel`` reads its rows three times, the second and third out of
cache. The last grid axis is keys or values, so that the branch on it is uniform.
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
    standardised,
    turn_of,
    write,
)

VARYING = ["n_tokens", "n_slots", "start", "first", *(f"key{i}" for i in range(8))]
"""Never specialised: a kernel for one key would be compiled anew for each segment. These are plain
arguments because Triton specialises what is inside a tuple."""


@triton.jit
def _plain(pages: Pages, out: Segment, places: Places, turn: Turn, stats, gate, noise: Noise,
           H: tl.constexpr, D: tl.constexpr, R2: tl.constexpr, N: tl.constexpr, X: tl.constexpr,
           CHANGES: tl.constexpr, GATE: tl.constexpr, NOISE: tl.constexpr,
           HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_X: tl.constexpr, KV: tl.constexpr):  # fmt: skip
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
def plain_kernel(k_pages: Pages, v_pages: Pages, k_out: Segment, v_out: Segment, slots, n_tokens,
                 n_slots, start, turn: Turn, stats, gate, table, first, key0, key1, key2, key3,
                 key4, key5, key6, key7, per_token, per_kind, steps, step, H: tl.constexpr,
                 D: tl.constexpr, R2: tl.constexpr, N: tl.constexpr, X: tl.constexpr,
                 CHANGES: tl.constexpr, GATE: tl.constexpr, NOISE: tl.constexpr,
                 HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_X: tl.constexpr):  # fmt: skip
    """Guards that treat a head alone: identity, gaussian, a gate without squeeze.

    Grid: (token tiles, H / HEADS, 2). stats: center, scale ``[2, H * D]``; gate: see ``gated``.
    """
    places = Places(slots, n_tokens, n_slots, start)
    key = (key0, key1, key2, key3, key4, key5, key6, key7)
    noise = Noise(table, key, first, per_token, per_kind, steps, step)
    if tl.program_id(2) == 0:
        _plain(k_pages, k_out, places, turn, stats, gate, noise, H, D, R2, N, X, CHANGES, GATE,
               NOISE, HEADS, BLOCK_T, BLOCK_D, BLOCK_X, 0)  # fmt: skip
    else:
        _plain(v_pages, v_out, places, turn, stats, gate, noise, H, D, R2, N, X, CHANGES, GATE,
               NOISE, HEADS, BLOCK_T, BLOCK_D, BLOCK_X, 1)  # fmt: skip


@triton.jit
def _bottleneck(pages: Pages, out: Segment, places: Places, turn: Turn, stats, net, noise: Noise,
                H: tl.constexpr, D: tl.constexpr, R2: tl.constexpr, N: tl.constexpr,
                R: tl.constexpr, NOISE: tl.constexpr, DOT: tl.constexpr, BLOCK_T: tl.constexpr,
                BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, KV: tl.constexpr):  # fmt: skip
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
def bottleneck_kernel(k_pages: Pages, v_pages: Pages, k_out: Segment, v_out: Segment, slots,
                      n_tokens, n_slots, start, turn: Turn, stats, net, table, first, key0, key1,
                      key2, key3, key4, key5, key6, key7, per_token, per_kind, steps, step,
                      H: tl.constexpr, D: tl.constexpr, R2: tl.constexpr, N: tl.constexpr,
                      R: tl.constexpr, NOISE: tl.constexpr, DOT: tl.constexpr,
                      BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
                      BLOCK_R: tl.constexpr):  # fmt: skip
    """The residual guard. Grid: (token tiles, 1, 2); net: as ``work.Bottleneck``."""
    places = Places(slots, n_tokens, n_slots, start)
    key = (key0, key1, key2, key3, key4, key5, key6, key7)
    noise = Noise(table, key, first, per_token, per_kind, steps, step)
    if tl.program_id(2) == 0:
        _bottleneck(k_pages, k_out, places, turn, stats, net, noise, H, D, R2, N, R, NOISE, DOT,
                    BLOCK_T, BLOCK_C, BLOCK_R, 0)  # fmt: skip
    else:
        _bottleneck(v_pages, v_out, places, turn, stats, net, noise, H, D, R2, N, R, NOISE, DOT,
                    BLOCK_T, BLOCK_C, BLOCK_R, 1)  # fmt: skip


@triton.jit
def _place(segment: Segment, pages: Pages, places: Places, turn: Turn, D: tl.constexpr,
           R2: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr,
           BLOCK_D: tl.constexpr, KV: tl.constexpr):  # fmt: skip
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
def place_kernel(k_segment: Segment, v_segment: Segment, k_pages: Pages, v_pages: Pages, slots,
                 n_tokens, n_slots, start, turn: Turn, D: tl.constexpr, R2: tl.constexpr,
                 N: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """Rotates a segment's keys and writes it into pages. Grid: (token tiles, H / HEADS, 2)."""
    places = Places(slots, n_tokens, n_slots, start)
    if tl.program_id(2) == 0:
        _place(k_segment, k_pages, places, turn, D, R2, N, HEADS, BLOCK_T, BLOCK_D, 0)
    else:
        _place(v_segment, v_pages, places, turn, D, R2, N, HEADS, BLOCK_T, BLOCK_D, 1)
