"""One rank's share of the paged KV as the guards know it: without positions, token by token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcguard.guards.passage import HeldTokens
from lcguard.manifest import TensorDigests
from lcguard.protocols import KVBatch
from lcguard.rope import Rotary
from lcguard.vllm.pages import (
    LayerPages,
    gather_layers,
    gather_tokens,
    slots_of,
    write_layers,
)

HASHED_TOKENS = 64
"""At a time, of what nobody else reads."""
TURNED_TOKENS = 64
"""At a time: what is turned stays in a processor's cache."""


@dataclass
class RankPages:
    """Reads and writes in bulk, on the tensors that vLLM registered."""

    rotary: Rotary
    block_size: int
    rank: int = 0
    world: int = 1
    """Ranks among which the model's KV heads are divided."""
    layers: list[LayerPages] = field(default_factory=list)
    """In layer order, once the engine has registered them."""

    @property
    def device(self) -> torch.device:
        return self.layers[0].pages.device

    def slots(self, blocks: list[int], start: int, end: int) -> Tensor:
        """Of the tokens ``start .. end`` of a request with this block table, ``[T]``."""
        return slots_of(blocks, self.block_size, start, end).to(self.device)

    def tokens(
        self, blocks: list[int], start: int, end: int, *, digested: bool = True
    ) -> PageTokens:
        """The same tokens, to be read some at a time; of one rank that has all heads."""
        slots = self.slots(blocks, start, end)
        return PageTokens(self.layers, slots, self.rotary, start, digested=digested)

    def read(self, blocks: list[int], start: int, end: int) -> tuple[Tensor, Tensor]:
        """Un-rotated keys, and values, ``[L, H, T, D]`` of this rank's heads, a copy."""
        keys, values = gather_layers(self.layers, self.slots(blocks, start, end))
        positions = torch.arange(start, end, device=self.device)
        return self.rotary.unrotate(keys, positions), values

    def place(self, blocks: list[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Writes position-free ``[L, H, T, D]`` of all ranks' heads from token ``start`` on."""
        keys, values = (self._own_heads(t).to(self.device) for t in (keys, values))
        end = start + keys.shape[2]
        rotated = self.rotary.rotate(keys, torch.arange(start, end, device=self.device))
        write_layers(self.layers, self.slots(blocks, start, end), rotated, values)

    def _own_heads(self, tensor: Tensor) -> Tensor:
        """This rank's heads of ``[L, H, T, D]``; with more ranks than heads, ranks share heads."""
        heads, total = self.layers[0].heads, tensor.shape[1]
        shared = heads * self.world > total
        first = self.rank * total // self.world if shared else self.rank * heads
        return tensor[:, first : first + heads]


class PageTokens:
    """What a request publishes, read from its pages: ``lcguard.guards.passage.Tokens``.

    Of one rank that has all heads. Un-rotated in float32, whatever the pages' dtype is.
    """

    def __init__(
        self,
        layers: list[LayerPages],
        slots: Tensor,
        rotary: Rotary,
        start: int,
        *,
        digested: bool = True,
    ) -> None:
        """``slots [T]``, the first of them at position ``start``. ``digested``: what is read is
        hashed on the way, for whoever asks for the digest in the end."""
        self.layers, self.slots, self.rotary, self.start = layers, slots, rotary, start
        self._digested = digested
        self._sha, self._hashed = hashlib.sha256(str(start).encode()), 0

    @property
    def n_tokens(self) -> int:
        return len(self.slots)

    def read(self, start: int, end: int, layers: Sequence[int] | None = None) -> KVBatch:
        of = self.layers if layers is None else [self.layers[i] for i in layers]
        both = gather_tokens(of, self.slots[start:end])
        if self._digested and layers is None and start <= self._hashed < end:
            new = both[self._hashed - start :].cpu().view(torch.uint8)
            self._sha.update(new.numpy().data)
            self._hashed = end
        both = both.float()
        positions = torch.arange(self.start + start, self.start + end, device=both.device)
        keys = self.rotary.unrotate(both[:, :, 0], positions[:, None, None])  # [t, L, H, D]
        valid = torch.ones(1, end - start, dtype=torch.bool, device=both.device)
        keys, values = (x.permute(1, 2, 0, 3)[None] for x in (keys, both[:, :, 1]))
        return KVBatch(keys, values, valid)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.layers), self.layers[0].heads, self.layers[0].dim

    def copy(self, keys: Tensor, values: Tensor) -> None:
        """Writes all of it, un-rotated, into ``[L, H, T, D]``: the bits that ``read`` would give,
        rounded to their dtype. Block by block, as a page holds its tokens side by side."""
        at = 0
        for block, first, n in self._runs():
            for layer, own, other in zip(self.layers, keys, values, strict=True):
                new, old = slice(at, at + n), layer.rows(block, first, n)
                own[:, new], other[:, new] = old
            at += n
        for start in range(0, self.n_tokens, TURNED_TOKENS):
            end = min(start + TURNED_TOKENS, self.n_tokens)
            positions = torch.arange(self.start + start, self.start + end, device=keys.device)
            keys[:, :, start:end] = self.rotary.unrotate(keys[:, :, start:end], positions)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Block, first place in it and number of tokens, where slots follow each other."""
        size, slots = self.layers[0].block, self.slots.tolist()
        at = 0
        while at < len(slots):
            block, first = divmod(slots[at], size)
            n = 1
            while at + n < len(slots) and first + n < size and slots[at + n] == slots[at] + n:
                n += 1
            yield block, first, n
            at += n

    def digest(self) -> str:
        """SHA-256 over where the pages' content stands and what it is, to the bit, token by token:
        the same however much is read at a time."""
        self._digested = True
        while self._hashed < self.n_tokens:
            self.read(self._hashed, min(self._hashed + HASHED_TOKENS, self.n_tokens))
        return self._sha.hexdigest()


class GatheredTokens(HeldTokens):
    """The same of several ranks, in memory."""

    def digest(self) -> str:
        """Of un-rotated KV to the bit."""
        both = TensorDigests.of(self._kv.keys, self._kv.values)
        return both.keys + both.values
