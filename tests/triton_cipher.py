"""The cipher of the kernels beside OpenSSL's. Imports Triton: see ``tests.triton_cases``."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from lcguard.noise import key_stream, normals
from lcguard.ops.chacha import chacha_words, normal_tile, spread


@triton.jit
def cipher_kernel(words, draws, key, first, BLOCKS: tl.constexpr):
    t, b = tl.arange(0, 2)[:, None], tl.arange(0, BLOCKS)[None, :]
    counter = (first + t * BLOCKS + b).to(tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = chacha_words(
        key, counter
    )
    tile = spread(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    at = t * BLOCKS * 16 + tl.arange(0, BLOCKS * 16)[None, :]
    tl.store(words + at, tile.to(tl.int32, bitcast=True))
    tl.store(draws + at, normal_tile(key, counter))


def cipher(device: str) -> tuple[float, float]:
    """How many words differ from the cipher's, and the draws' largest difference.

    The last blocks of a key, and key words with the sign bit set.
    """
    key, first = bytes(255 - 7 * i for i in range(32)), 2**32 - 8
    words = torch.zeros(8, 16, dtype=torch.int32, device=device)
    draws = torch.zeros(8, 16, device=device)
    secret = tuple(int(word) for word in np.frombuffer(key, dtype="<i4"))
    cipher_kernel[(1,)](words, draws, secret, first, BLOCKS=4, enable_fp_fusion=True)
    expected = key_stream(key, first, 8)
    wrong = (words.cpu().numpy().view(np.uint32) != expected).sum()
    return float(wrong), float((draws.cpu() - normals(expected)).abs().max())
