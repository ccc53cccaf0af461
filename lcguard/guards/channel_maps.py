"""Linear maps of a token's entries, one for each layer and K or V, in three sizes.

``full`` mixes all channels of a layer: ``[L, 2, W, W]``, W = H * D, which at 8 KV heads of 128 and
36 layers is 302 MB a map. ``per_head`` keeps to the head, ``[L, 2, H, D, D]``. ``low_rank`` adds
R directions to the identity, ``z + (z U^T) V``, with U and V in one tensor ``[L, 2, 2, R, W]``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lcguard.guards.base import KVShape

Kind = Literal["full", "per_head", "low_rank"]
OF_INVERSE: dict[Kind, Kind] = {"full": "full", "per_head": "per_head", "low_rank": "full"}
"""What kind the inverse of a map is."""


def identity(kind: Kind, shape: KVShape, rank: int) -> Tensor:
    """The map that changes nothing, to start from.

    Raises ``ValueError`` for an unknown kind, or a rank outside 1 .. W.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"maps {kind!r} are unknown: use {', '.join(get_args(Kind))}")
    width = shape.kv_heads * shape.head_dim
    if kind == "full":
        return torch.eye(width).repeat(shape.layers, 2, 1, 1)
    if kind == "per_head":
        return torch.eye(shape.head_dim).repeat(shape.layers, 2, shape.kv_heads, 1, 1)
    if not 0 < rank <= width:
        raise ValueError(f"rank {rank} must be within 1 and the {width} channels of a layer")
    both: Tensor = torch.randn(shape.layers, 2, 2, rank, width) * width**-0.5
    both[:, :, 1] = 0  # V: what is read is not written yet
    return both


def apply(kind: Kind, z: Tensor, matrix: Tensor) -> Tensor:
    """``z [B, T, L, 2, W]`` through the maps of all layers."""
    if kind == "full":
        return torch.einsum("btlkc,lkcd->btlkd", z, matrix)
    if kind == "per_head":
        by_head = z.unflatten(-1, matrix.shape[2:4])
        return torch.einsum("btlkhc,lkhcd->btlkhd", by_head, matrix).flatten(-2)
    read = torch.einsum("btlkc,lkrc->btlkr", z, matrix[:, :, 0])
    return z + torch.einsum("btlkr,lkrc->btlkc", read, matrix[:, :, 1])


def dense(kind: Kind, matrix: Tensor) -> Tensor:
    """One layer's maps ``[2, ...]`` as matrices ``[2, W, W]``."""
    if kind == "full":
        return matrix
    if kind == "per_head":
        return torch.stack([torch.block_diag(*one) for one in matrix])
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return eye + matrix[:, 0].mT @ matrix[:, 1]


def inverse(kind: Kind, matrix: Tensor) -> Tensor:
    """What undoes all layers' maps as far as that can be done, of kind ``OF_INVERSE[kind]``."""
    if OF_INVERSE[kind] != kind:
        matrix = torch.stack([dense(kind, layer) for layer in matrix])
    out: Tensor = torch.linalg.pinv(matrix)
    return out


def is_identity(kind: Kind, matrix: Tensor) -> bool:
    """Whether one layer's maps ``[2, ...]`` change nothing, to the last bit."""
    if kind == "low_rank":
        return not bool(matrix[:, 1].any())
    return bool((matrix == torch.eye(matrix.shape[-1], device=matrix.device)).all())
