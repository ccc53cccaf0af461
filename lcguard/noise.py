"""The noise of a guard: discrete Gaussian draws from the ChaCha20 key stream (RFC 8439).

A receiver who could rebuild the noise would subtract it, and a closed gate shows him some of it as
it is. So the noise of a published segment comes from a 32-byte secret drawn for that segment alone
and forgotten, through a cipher, and is a function of the entry's place, never of a batch's.

The stream is counter-based: every (token, layer, K or V, head) owns ``ceil(D / 8)`` blocks of 16
words, two for a draw, so that a kernel makes any part of it alone, and a tensor-parallel shard its
own heads. See ``lcguard.discrete_gaussian`` for the law and ``lcguard.grid`` for where it is added.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from lcguard.discrete_gaussian import discrete_gaussian

KEY_BYTES = 32
WORDS = 16
"""32-bit words in a block of ChaCha20."""
DRAWS = WORDS // 2
"""Draws of a block."""
CHUNK_BLOCKS = 1 << 12
"""Blocks at a time: what they are turned into stays in a processor's cache."""
_ZEROS = bytes(64 * CHUNK_BLOCKS)
"""What is enciphered, to see the key stream alone."""


def new_noise_key() -> bytes:
    """A secret for one segment; keep it no longer than it takes to make the noise."""
    return secrets.token_bytes(KEY_BYTES)


def noise_key(seed: int, name: str) -> bytes:
    """A reproducible key, for training and evaluation only: whoever knows the seed knows it."""
    return hashlib.sha256(f"lcguard noise\0{seed}\0{name}".encode()).digest()


def blocks_per_head(head_dim: int) -> int:
    """Cipher blocks that one head of one token takes."""
    return -(-head_dim // DRAWS)


def key_stream(key: bytes, first_block: int, n_blocks: int) -> np.ndarray:
    """Words ``[n_blocks, 16]`` uint32, from block ``first_block`` on, under a nonce of zeros.

    Raises ``ValueError`` for a key of another length, or past the cipher's 2^32 blocks.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"the noise key has {len(key)} bytes, {KEY_BYTES} are needed")
    if first_block < 0 or first_block + n_blocks > 1 << 32:
        raise ValueError(
            f"noise blocks {first_block}..{first_block + n_blocks} exceed 2^32 for one key: "
            "publish the segment in parts"
        )
    nonce = first_block.to_bytes(4, "little") + bytes(12)
    cipher = Cipher(ChaCha20(key, nonce), mode=None).encryptor()
    few = n_blocks <= CHUNK_BLOCKS
    zeros = memoryview(_ZEROS)[: 64 * n_blocks] if few else bytes(64 * n_blocks)
    return np.frombuffer(cipher.update(zeros), dtype="<u4").reshape(-1, WORDS)


def segment_noise(
    key: bytes, shape: tuple[int, int, int], n_tokens: int, first_token: int = 0
) -> Tensor:
    """Noise of a segment in steps of the grid, int16 ``[T, L, 2, H * D]``.

    Args:
        shape: (L, H, D) of the model's KV.
        first_token: where in the segment the T tokens start.
    """
    layers, heads, dim = shape
    a_head = blocks_per_head(dim)
    a_token = layers * 2 * heads * a_head
    out = torch.empty(n_tokens, layers, 2, heads * dim, dtype=torch.int16)
    chunk = max(1, CHUNK_BLOCKS // a_token)
    for start in range(0, n_tokens, chunk):
        n = min(chunk, n_tokens - start)
        words = key_stream(key, (first_token + start) * a_token, n * a_token)
        noise = torch.from_numpy(discrete_gaussian(words))
        by_head = noise.view(n, layers, 2, heads, a_head * DRAWS)[..., :dim]
        out[start : start + n] = by_head.flatten(3)
    return out
