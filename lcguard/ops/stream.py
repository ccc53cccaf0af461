"""Where the noise of one layer, and of some of its heads, lies in its segment's stream.

``lcguard.noise`` gives each (token, layer, K or V, head) cipher blocks of its own, in this order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcguard.discrete_gaussian import discrete_gaussian
from lcguard.noise import CHUNK_BLOCKS, KEY_BYTES, blocks_per_head, key_stream


@dataclass(frozen=True)
class NoiseStream:
    """Where the noise of a layer lies in its segment's stream; see ``lcguard.noise``."""

    key: bytes = field(repr=False)  # a log must not hold it
    layer: int
    layers: int
    """L of the model."""
    heads: int
    """KV heads of the whole model."""
    first_head: int = 0
    """The shard's first."""
    first_token: int = 0
    """Place in the segment of the first row to be rewritten."""

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"the noise key has {len(self.key)} bytes, {KEY_BYTES} are needed")

    def blocks_per_token(self, head_dim: int) -> int:
        return self.layers * 2 * self.heads * blocks_per_head(head_dim)

    def check(self, n_tokens: int, head_dim: int) -> None:
        """Raises ``ValueError`` past the cipher's 2^32 blocks for one key."""
        end = (self.first_token + n_tokens) * self.blocks_per_token(head_dim)
        if self.first_token < 0 or end > 1 << 32:
            raise ValueError(
                f"{n_tokens} tokens from {self.first_token} on need {end} noise blocks, one key "
                "has 2^32: publish the segment in parts"
            )

    def draw(self, heads: int, head_dim: int, n_tokens: int) -> Tensor:
        """The part of ``segment_noise`` of these heads: int16 ``[T, 2, heads * D]`` on the CPU.

        Runs the cipher over the other layers' blocks too: seeking once a token takes longer.
        """
        self.check(n_tokens, head_dim)
        a_token = self.blocks_per_token(head_dim)
        chunk = max(1, CHUNK_BLOCKS // a_token)
        parts = [torch.empty(0, 2, heads * head_dim, dtype=torch.int16)]
        for start in range(0, n_tokens, chunk):
            n = min(chunk, n_tokens - start)
            words = key_stream(self.key, (self.first_token + start) * a_token, n * a_token)
            words = words.reshape(n, self.layers, 2, self.heads, -1)[:, self.layer]
            own = words[:, :, self.first_head : self.first_head + heads]
            parts.append(torch.from_numpy(discrete_gaussian(own))[..., :head_dim].flatten(2))
        return torch.cat(parts)
