"""The specification of the kernels, in PyTorch: any device, any strides.

A page view is ``[B, H, N, D]``: B blocks of N rows; slot s is row ``s % N`` of block ``s // N``. A
negative slot is padding: it is read as zeros, guarded to zeros and never written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.grid import noisy
from lcguard.ops.work import Bottleneck, TokenWork
from lcguard.rope import Rotary

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gather(k_view: Tensor, v_view: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of paged keys and values ``[B, H, N, D]`` at ``slots [T]``: two ``[T, H, D]``.

    Raises ``ValueError`` for a slot past the last page.
    """
    page, row, live = _places(k_view, slots)
    keys, values = (
        torch.where(live[:, None, None], view[page, :, row], view.new_zeros(()))
        for view in (k_view, v_view)
    )
    return keys, values


@torch.no_grad()
def scatter(keys: Tensor, values: Tensor, slots: Tensor, k_view: Tensor, v_view: Tensor) -> None:
    """Writes ``[T, H, D]`` into the pages at ``slots [T]``; the opposite of ``gather``."""
    page, row, live = _places(k_view, slots)
    page, row = page[live], row[live]
    k_view[page, :, row] = keys[live].to(k_view.dtype)
    v_view[page, :, row] = values[live].to(v_view.dtype)


@torch.no_grad()
def rewrite_layer(
    k_view: Tensor,
    v_view: Tensor,
    slots: Tensor,
    rotary: Rotary,
    start: int,
    work: TokenWork,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    """Guards a token range of one layer and takes the position off.

    Computes in float32 throughout and rounds once, to the dtype of the output.

    Args:
        k_view, v_view: pages ``[B, H, N, D]`` of this process's heads.
        slots: int64 ``[T]``.
        start: position of the first token, padding included.
        work: of this layer, these heads and these tokens.
        out_keys, out_values: ``[H, T, D]``, overwritten.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; too many noise blocks.
    """
    check_layer(k_view, v_view, slots, rotary, out_keys, out_values)
    check_work(work, k_view, slots)
    live = slots >= 0
    keys, values = (x.float().transpose(0, 1) for x in gather(k_view, v_view, slots))
    keys = rotary.unrotate(keys, _positions(start, slots))
    x = torch.stack((keys, values)).permute(2, 0, 1, 3).flatten(2)  # [T, 2, W]
    x = guard_tokens(x, work, k_view.shape[3])
    x = torch.where(live[:, None, None], x, 0.0)
    out = x.unflatten(2, (k_view.shape[1], k_view.shape[3])).permute(1, 2, 0, 3)
    out_keys.copy_(out[0])
    out_values.copy_(out[1])


@torch.no_grad()
def place_layer(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rotary: Rotary,
    offset: int,
    k_view: Tensor,
    v_view: Tensor,
) -> None:
    """Writes position-free ``[H, T, D]`` into the pages, the first token at position ``offset``.

    See ``rewrite_layer`` for the arguments and errors.
    """
    check_layer(k_view, v_view, slots, rotary, keys, values)
    placed = rotary.rotate(keys.float(), _positions(offset, slots))
    scatter(placed.transpose(0, 1), values.transpose(0, 1), slots, k_view, v_view)


def guard_tokens(x: Tensor, work: TokenWork, head_dim: int) -> Tensor:
    """Raw un-rotated channels ``[T, 2, W]`` float32 to guarded ones."""
    if work.passes:
        return x
    z = (x - work.center) / work.scale
    if work.bottleneck:
        z = _residual(z, work.bottleneck)
    gate = work.gate
    if gate:
        if gate.squeeze is not None:
            z = torch.einsum("tkc,kcd->tkd", z, gate.squeeze)
        closed = gate.closed[..., None]
        z = (1 - closed) * z + closed * torch.einsum("tx,xkc->tkc", gate.words, gate.codebook)
    if work.noise and work.stream:
        z = noisy(z, work.noise, work.stream.draw(x.shape[2] // head_dim, head_dim, len(x)))
    if gate and gate.expand is not None:
        z = torch.einsum("tkc,kcd->tkd", z, gate.expand)
    return z * work.scale + work.center


def _residual(z: Tensor, b: Bottleneck) -> Tensor:
    normed = F.layer_norm(z, z.shape[-1:]) * b.gain + b.bias
    hidden = F.gelu(torch.einsum("tkc,kcr->tkr", normed, b.down) + b.down_bias)
    return z + torch.einsum("tkr,krc->tkc", hidden, b.up) + b.up_bias


def check_layer(
    k_view: Tensor, v_view: Tensor, slots: Tensor, rotary: Rotary, keys: Tensor, values: Tensor
) -> None:
    """Raises ``ValueError`` unless pages, slots, rotation and segment belong together."""
    if k_view.ndim != 4 or k_view.shape != v_view.shape or k_view.dtype != v_view.dtype:
        raise ValueError(
            f"pages {k_view.dtype} {tuple(k_view.shape)} and {v_view.dtype} {tuple(v_view.shape)}: "
            "give two views [B, H, N, D]"
        )
    heads, dim = k_view.shape[1], k_view.shape[3]
    if slots.dtype != torch.int64 or slots.ndim != 1:
        raise ValueError(f"slots are {slots.dtype} {tuple(slots.shape)}: give int64 [T]")
    if rotary.head_dim != dim:
        raise ValueError(f"pages have D={dim}, this rotation D={rotary.head_dim}")
    for name, tensor in (("keys", keys), ("values", values)):
        if (*tensor.shape,) != (heads, len(slots), dim):
            raise ValueError(f"{name} {tuple(tensor.shape)} are not {(heads, len(slots), dim)}")
    for tensor in (k_view, keys, values):
        # An 8-bit page needs its scale, which nothing here knows.
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.dtype} is not supported: use float32, float16 or bfloat16")
    devices = {str(t.device) for t in (k_view, v_view, slots, keys, values)}
    if len(devices) > 1:
        raise ValueError(f"pages, slots and segment are on {sorted(devices)}: use one device")


def check_work(work: TokenWork, k_view: Tensor, slots: Tensor) -> None:
    """Raises ``ValueError`` unless the work is for these heads, tokens and device."""
    _, heads, _, dim = k_view.shape
    if work.center.shape[1] != heads * dim:
        raise ValueError(
            f"the work is for W={work.center.shape[1]}, the pages have H * D = {heads} * {dim}"
        )
    if work.gate and len(work.gate.closed) != len(slots):
        raise ValueError(f"the gate decided on {len(work.gate.closed)} tokens of {len(slots)}")
    if work.center.device != k_view.device:
        raise ValueError(
            f"the work is on {work.center.device}, the pages on {k_view.device}: move the guard"
        )
    if stream := work.stream:
        stream.check(len(slots), dim)
        if not 0 <= stream.first_head <= stream.heads - heads:
            raise ValueError(
                f"{heads} heads from {stream.first_head} on are not of {stream.heads} KV heads"
            )


def _places(view: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block, row and liveness of each slot."""
    blocks, _, rows, _ = view.shape
    if len(slots) and int(slots.max()) >= blocks * rows:
        raise ValueError(f"slot {int(slots.max())} is past the last of {blocks * rows}")
    safe = slots.clamp_min(0)
    return safe // rows, safe % rows, slots >= 0


def _positions(first: int, slots: Tensor) -> Tensor:
    return torch.arange(first, first + len(slots), device=slots.device)
