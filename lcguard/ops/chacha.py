"""The noise of ``lcguard.noise`` inside a Triton kernel: ChaCha20 (RFC 8439) and the alias table.

A cipher block gives 16 words, so 8 channels share one: a tile of ``[tokens, D]`` noise costs a
tile of ``[tokens, D / 8]`` ciphers. Words are those of ``key_stream`` and draws those of
``discrete_gaussian``, to the bit: nothing here is a floating-point number.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _quarter(a, b, c, d):
    # 32-bit additions wrap: Triton must not guard them.
    a = tl.add(a, b, sanitize_overflow=False)
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = tl.add(c, d, sanitize_overflow=False)
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = tl.add(a, b, sanitize_overflow=False)
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = tl.add(c, d, sanitize_overflow=False)
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _word(value, like):
    """A 32-bit scalar as a tile."""
    return tl.full(like.shape, 0, tl.uint32) | value.to(tl.uint32, bitcast=True)


@triton.jit
def chacha_words(key, counter):
    """The 16 words, each a uint32 tile like ``counter``, of the blocks ``counter``.

    key: 8 scalars int32, the secret's little-endian words; the nonce is zero.
    """
    c0 = tl.full(counter.shape, 0x61707865, tl.uint32)  # "expand 32-byte k"
    c1 = tl.full(counter.shape, 0x3320646E, tl.uint32)
    c2 = tl.full(counter.shape, 0x79622D32, tl.uint32)
    c3 = tl.full(counter.shape, 0x6B206574, tl.uint32)
    k0, k1 = _word(key[0], counter), _word(key[1], counter)
    k2, k3 = _word(key[2], counter), _word(key[3], counter)
    k4, k5 = _word(key[4], counter), _word(key[5], counter)
    k6, k7 = _word(key[6], counter), _word(key[7], counter)
    nonce = tl.full(counter.shape, 0, tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7 = c0, c1, c2, c3, k0, k1, k2, k3
    x8, x9, x10, x11, x12, x13, x14, x15 = k4, k5, k6, k7, counter, nonce, nonce, nonce
    # Rolled: 10 double rounds unrolled are a thousand instructions per use.
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    x0 = tl.add(x0, c0, sanitize_overflow=False)
    x1 = tl.add(x1, c1, sanitize_overflow=False)
    x2 = tl.add(x2, c2, sanitize_overflow=False)
    x3 = tl.add(x3, c3, sanitize_overflow=False)
    x4 = tl.add(x4, k0, sanitize_overflow=False)
    x5 = tl.add(x5, k1, sanitize_overflow=False)
    x6 = tl.add(x6, k2, sanitize_overflow=False)
    x7 = tl.add(x7, k3, sanitize_overflow=False)
    x8 = tl.add(x8, k4, sanitize_overflow=False)
    x9 = tl.add(x9, k5, sanitize_overflow=False)
    x10 = tl.add(x10, k6, sanitize_overflow=False)
    x11 = tl.add(x11, k7, sanitize_overflow=False)
    x12 = tl.add(x12, counter, sanitize_overflow=False)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _draw(table, low, high):
    """Two words to a draw int32, as ``lcguard.discrete_gaussian.discrete_gaussian``."""
    slot = (high >> 17).to(tl.int32)
    entry = tl.load(table + slot).to(tl.uint64, bitcast=True)
    word = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    own = (word << 15) < (entry << 15)
    return tl.where(own, slot, (entry >> 49).to(tl.int32)) - 16384


@triton.jit
def spread(x0, x1, x2, x3, x4, x5, x6, x7):
    """8 tiles ``[T, B]`` to one ``[T, B * 8]``, where ``x_i`` is column ``i`` of each 8."""
    # The last join is the fastest index: it parts the even draws from the odd ones.
    a = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    b = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(a, b), (x0.shape[0], x0.shape[1] * 8))


@triton.jit
def draw_tile(table, key, counter):
    """int32 draws ``[T, B * 8]`` of the cipher blocks ``counter [T, B]`` uint32.

    table: int64, the bits of ``lcguard.discrete_gaussian.table``.
    """
    (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15) = chacha_words(
        key, counter
    )
    return spread(
        _draw(table, x0, x1),
        _draw(table, x2, x3),
        _draw(table, x4, x5),
        _draw(table, x6, x7),
        _draw(table, x8, x9),
        _draw(table, x10, x11),
        _draw(table, x12, x13),
        _draw(table, x14, x15),
    )
