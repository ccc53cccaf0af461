"""Views of vLLM's paged KV: where key and value of a slot stand in each layer's tensor.

vLLM 0.32 hands a connector one logical tensor ``[B, H, N, C]`` a layer (blocks, KV heads, tokens of
a block, C = 2 D), in any physical order. CUDA backends keep K in ``[..., :D]`` and V in
``[..., D:]``; the CPU backend keeps in each page the keys *transposed*, ``[D, N]``, then the values
``[N, D]``. What a layout means is not guessed: ``probe`` lets vLLM write known numbers and reads
them back, and an engine whose pages read differently does not start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lcguard.vllm.errors import StartError

CPU_LAYOUTS = ("vec", "vec16")
"""Kernels of the CPU backend whose page layout is known; AMX packs keys in its own order."""


class LayerPages:
    """Keys and values of one attention layer, addressed by slot."""

    def __init__(self, name: str, layer: Any, pages: Tensor) -> None:
        if pages.ndim != 4 or pages.shape[3] % 2 or not pages.is_floating_point():
            raise StartError(
                f"{name}: KV pages of shape {tuple(pages.shape)} and {pages.dtype} are not "
                "[blocks, heads, tokens, 2 D] of floats: use an unquantised KV cache without MLA"
            )
        self.name, self.layer, self.pages = name, layer, pages
        blocks, heads, self.block, width = pages.shape
        self.heads, self.dim = heads, width // 2
        isa = getattr(layer, "isa", None)
        if pages.device.type != "cpu":
            self.keys, self.values = pages[..., : self.dim], pages[..., self.dim :]
        elif isa in CPU_LAYOUTS:
            page = pages.view(blocks, heads, 2, self.block * self.dim)
            self.keys = page[:, :, 0].unflatten(-1, (self.dim, self.block)).transpose(-1, -2)
            self.values = page[:, :, 1].unflatten(-1, (self.block, self.dim))
        else:
            raise StartError(
                f"{name}: CPU attention kernel {isa!r} keeps KV in an unknown order; known: "
                f"{', '.join(CPU_LAYOUTS)} (on AMX machines use float32)"
            )

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of ``slots [T]``, each ``[T, H, D]``, a copy."""
        block, row = slots // self.block, slots % self.block
        return self.keys[block, :, row], self.values[block, :, row]

    def rows(self, block: int, first: int, n: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of ``n`` tokens of one block, each ``[H, n, D]``, a view."""
        own = slice(first, first + n)
        return self.keys[block, :, own], self.values[block, :, own]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Rotated keys and values ``[T, H, D]`` into ``slots``, by vLLM's own operation."""
        self.layer.impl.do_kv_cache_update(
            self.layer,
            keys.to(self.pages.dtype).contiguous(),
            values.to(self.pages.dtype).contiguous(),
            self.pages,
            slots,
        )

    @contextmanager
    def null_block_kept(self) -> Iterator[None]:
        """Puts the content of vLLM's null block, which no request ever owns, back in the end."""
        saved = self.pages[0].clone()
        try:
            yield
        finally:
            self.pages[0].copy_(saved)

    def probe(self) -> None:
        """Writes known numbers with vLLM's operation into its null block and reads them back.

        Raises ``StartError`` where this class reads anything else.
        """
        n = min(3, self.block)
        # block 0 is vLLM's null block
        slots = torch.arange(self.block - n, self.block, device=self.pages.device)
        numbers = torch.arange(1, 2 * n * self.heads * self.dim + 1, device=self.pages.device)
        # small distinct numbers survive bfloat16's 8 bits when they are below 256
        wanted = (numbers % 251).to(self.pages.dtype).view(2, n, self.heads, self.dim)
        try:
            with self.null_block_kept():
                self.write(slots, wanted[0], wanted[1])
                keys, values = self.gather(slots)
        except (RuntimeError, AttributeError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise StartError(f"{self.name}: the layout probe failed: {first}") from error
        if not (torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])):
            raise StartError(
                f"{self.name}: pages of shape {tuple(self.pages.shape)} and strides "
                f"{self.pages.stride()} read back differently than vLLM wrote them: this KV "
                "layout is not supported"
            )


def gather_layers(layers: Sequence[LayerPages], slots: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of ``slots [T]``, each ``[L, H, T, D]``, a copy."""
    both = [layer.gather(slots) for layer in layers]
    keys = torch.stack([k.transpose(0, 1) for k, _ in both])
    return keys, torch.stack([v.transpose(0, 1) for _, v in both])


def gather_tokens(layers: Sequence[LayerPages], slots: Tensor) -> Tensor:
    """The same token by token: ``[T, L, 2, H, D]``, keys first."""
    both = torch.stack([x for layer in layers for x in layer.gather(slots)], 1)
    return both.view(len(slots), len(layers), 2, *both.shape[2:])


def write_layers(layers: Sequence[LayerPages], slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Rotated keys and values ``[L, H, T, D]`` into ``slots [T]``."""
    for layer, key, value in zip(layers, keys, values, strict=True):
        layer.write(slots, key.transpose(0, 1), value.transpose(0, 1))


def slots_of(blocks: list[int], block_size: int, start: int, end: int) -> Tensor:
    """Slots ``[end - start]`` int64 of token positions of a request with this block table."""
    position = torch.arange(start, end)
    table = torch.tensor(blocks, dtype=torch.int64)
    return table[position // block_size] * block_size + position % block_size
