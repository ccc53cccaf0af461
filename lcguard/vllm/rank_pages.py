"""One rank's share of the paged KV as the guards know it: without positions, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcguard.rope import Rotary
from lcguard.vllm.pages import LayerPages, gather_layers, slots_of, write_layers


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
