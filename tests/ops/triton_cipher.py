"""The noise of the kernels beside OpenSSL's and numpy's. Imports Triton: see ``triton_cases``."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from lcguard.discrete_gaussian import STEPS, discrete_gaussian, table
from lcguard.grid import noisy, step_size, steps_per_unit, to_grid
from lcguard.noise import key_stream
from lcguard.ops.chacha import chacha_words, draw_tile
from lcguard.ops.tiles import Noise
from lcguard.ops.tiles import noisy as noisy_tile


@triton.jit
def cipher_kernel(words, draws, law, key, first, BLOCKS: tl.constexpr):
    t, b = tl.arange(0, 2)[:, None], tl.arange(0, BLOCKS)[None, :]
    counter = (first + t * BLOCKS + b).to(tl.uint32)
    x = chacha_words(key, counter)
    for i in tl.static_range(16):
        tl.store(words + (t * BLOCKS + b) * 16 + i, x[i].to(tl.int32, bitcast=True))
    at = t * BLOCKS * 8 + tl.arange(0, BLOCKS * 8)[None, :]
    tl.store(draws + at, draw_tile(law, key, counter))


@triton.jit
def grid_kernel(mean, out, law, key, steps, step, COLUMNS: tl.constexpr):
    t = tl.arange(0, 1)
    at = t[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    noise = Noise(law, key, 0, COLUMNS // 8, 0, steps, step)
    z = noisy_tile(tl.load(mean + at), noise, t, tl.arange(0, COLUMNS // 8), 0)
    tl.store(out + at, z)


def law_on(device: str) -> torch.Tensor:
    return torch.from_numpy(table().view(np.int64)).to(device)


def cipher(device: str) -> tuple[float, float]:
    """How many words, and how many draws, differ from the cipher's and from numpy's.

    The last blocks of a key, and key words with the sign bit set.
    """
    key, first = bytes(255 - 7 * i for i in range(32)), 2**32 - 8
    words = torch.zeros(8, 16, dtype=torch.int32, device=device)
    draws = torch.zeros(8, 8, dtype=torch.int32, device=device)
    secret = tuple(int(word) for word in np.frombuffer(key, dtype="<i4"))
    cipher_kernel[(1,)](
        words, draws, law_on(device), secret, first, BLOCKS=4, enable_fp_fusion=True
    )
    expected = key_stream(key, first, 8)
    wrong = (words.cpu().numpy().view(np.uint32) != expected).sum()
    return float(wrong), float((draws.cpu().numpy() != discrete_gaussian(expected)).sum())


def grid(device: str, noise: float = 0.21) -> tuple[float, float]:
    """How many outputs differ from ``lcguard.grid.noisy``: ties, far means and what is not finite;
    and how many are no grid point of the reference."""
    steps = torch.arange(-20, 20) / 2  # every other one a tie where 1 / noise is exact
    far = torch.tensor([1e4, -1e4, 1e9, -1e9, torch.inf, -torch.inf, torch.nan, 3e38])
    mean = torch.cat((steps * noise / STEPS, far, torch.randn(16)))
    expected = noisy(
        mean,
        noise,
        torch.from_numpy(discrete_gaussian(key_stream(bytes(32), 0, 8)).flatten().copy()),
    )
    out = torch.zeros(64, device=device)
    grid_kernel[(1,)](
        mean.to(device),
        out,
        law_on(device),
        (0,) * 8,
        steps_per_unit(noise),
        step_size(noise),
        COLUMNS=64,
        enable_fp_fusion=True,
    )
    found = out.cpu()
    wrong = ~((found == expected) | (found.isnan() & expected.isnan()))
    whole = found[:40] / step_size(noise)
    return float(wrong.sum()), float((to_grid(found[:40], noise) != whole.round()).sum())
