"""What a guard does to one token of one layer, as tensors that a kernel can read.

    z = (x - center) / scale
    z' = z + up(gelu(down(layer_norm(z) * gain + bias) + down_bias)) + up_bias      residual
    z' = expand([(1 - g) squeeze(z) + g sum_w p_w c_w] + sigma n)                   gate
    x' = z' scale + center

with keys un-rotated. Every other guard adds ``sigma n`` last; [.] is rounded to the grid that
``sigma n`` is on (``lcguard.grid``). What reads the whole segment, the
gate's context network, runs before (``decide``) and leaves g and p. W = H * D channels, R
bottleneck width, X words of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lcguard.guards import channel_maps
from lcguard.guards.base import GuardModule
from lcguard.guards.gate import GateGuard
from lcguard.guards.gaussian import GaussianGuard
from lcguard.guards.identity import IdentityGuard
from lcguard.guards.residual import ResidualGuard
from lcguard.ops.stream import NoiseStream
from lcguard.protocols import Mask

KINDS = (GateGuard, GaussianGuard, IdentityGuard, ResidualGuard)
"""Guards with a per-token form."""


def _expect(size: tuple[int, ...], **tensors: Tensor) -> None:
    """A kernel would read past the end of what is too small."""
    for name, tensor in tensors.items():
        if (*tensor.shape,) != size or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {size}")


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """``ResidualGuard`` of one layer, float32."""

    gain: Tensor
    """``[2, W]``."""
    bias: Tensor
    """``[2, W]``."""
    down: Tensor
    """``[2, W, R]``."""
    down_bias: Tensor
    """``[2, R]``."""
    up: Tensor
    """``[2, R, W]``."""
    up_bias: Tensor
    """``[2, W]``."""

    def __post_init__(self) -> None:
        width, r = self.down.shape[-2:]
        _expect((2, width), gain=self.gain, bias=self.bias, up_bias=self.up_bias)
        _expect((2, width, r), down=self.down)
        _expect((2, r), down_bias=self.down_bias)
        _expect((2, r, width), up=self.up)


@dataclass(frozen=True, eq=False)
class Gate:
    """``GateGuard`` of one layer after its context network, float32."""

    closed: Tensor
    """g, ``[T, 2]`` in 0..1: 1 replaces the entry."""
    words: Tensor
    """p, ``[T, X]``: weights of the words."""
    codebook: Tensor
    """c, ``[X, 2, W]``."""
    squeeze: Tensor | None = None
    """``[2, W, W]``, z to z; None for the identity."""
    expand: Tensor | None = None
    """As ``squeeze``; both or none."""

    def __post_init__(self) -> None:
        words, _, width = self.codebook.shape
        _expect((len(self.words), 2), closed=self.closed)
        _expect((len(self.closed), words), words=self.words)
        _expect((words, 2, width), codebook=self.codebook)
        if (self.squeeze is None) != (self.expand is None):
            raise ValueError("squeeze and expand: give both or none")
        if self.squeeze is not None and self.expand is not None:
            _expect((2, width, width), squeeze=self.squeeze, expand=self.expand)


@dataclass(frozen=True, eq=False)
class TokenWork:
    """The per-token part of a guard for one layer's keys (row 0) and values (row 1)."""

    center: Tensor
    """``[2, W]`` float32, like ``scale``: the channels' statistics."""
    scale: Tensor
    bottleneck: Bottleneck | None = None
    gate: Gate | None = None
    noise: float = 0.0
    """sigma, in units of each channel's own standard deviation."""
    stream: NoiseStream | None = None

    @property
    def passes(self) -> bool:
        """True where nothing is computed, so that nothing is rounded either."""
        return self.bottleneck is None and self.gate is None and not self.noise

    def __post_init__(self) -> None:
        width = self.center.shape[-1]
        _expect((2, width), center=self.center, scale=self.scale)
        if self.noise and self.stream is None:
            raise ValueError(
                f"noise {self.noise} needs a key: give lcguard.noise.new_noise_key(), one for all "
                "layers of a segment"
            )
        if self.bottleneck and self.gate:
            raise ValueError("bottleneck and gate: one guard has one of them")
        if self.bottleneck:
            _expect((2, width), gain=self.bottleneck.gain)
        if self.gate:
            _expect((len(self.gate.codebook), 2, width), codebook=self.gate.codebook)


@dataclass(frozen=True, eq=False)
class Decision:
    """What a gate's context network says of one segment."""

    closed: Tensor
    """``[T, L, 2]`` in 0..1."""
    words: Tensor
    """``[T, X]``."""
    mask: Mask
    """The policy that was asked for: one record."""


@torch.no_grad()
def decide(module: GateGuard, z: Tensor, mask: Mask) -> Decision:
    """Runs the context network on standardised KV ``z [T, L, 2, W]`` of one whole segment.

    All heads of the model, however they are sharded afterwards. Raises ``ValueError`` for a mask
    of several records.
    """
    if len(mask.forbid) != 1:
        raise ValueError(f"the mask has {len(mask.forbid)} records: give the segment's own")
    valid = torch.ones(1, len(z), dtype=torch.bool, device=z.device)
    seen = module.decision(module.context(z[None], valid), mask)
    return Decision(seen.closed[0], seen.words[0], mask)


@torch.no_grad()
def work_of(
    module: GuardModule,
    layer: int,
    *,
    noise_key: bytes | None = None,
    first_token: int = 0,
    first_head: int = 0,
    heads: int | None = None,
    decision: Decision | None = None,
) -> TokenWork:
    """The work of a fitted guard in one layer, on the device of the module.

    Args:
        noise_key: the segment's secret, the same for all its layers.
        first_token: place in the segment of the first token to be rewritten.
        first_head, heads: a tensor-parallel shard; the default is all heads.
        decision: of the gate, for the T tokens to be rewritten.

    Raises:
        ValueError: a guard without a per-token form, a layer or shard out of range, a shard of a
            guard that mixes heads, noise without a key, a gate without a decision.
    """
    if type(module) not in KINDS:  # a subclass may do more
        known = ", ".join(kind.name for kind in KINDS)
        raise ValueError(f"guard {module.name!r} has no per-token form; these have: {known}")
    shape = module.shape
    heads = shape.kv_heads - first_head if heads is None else heads
    if not 0 <= layer < shape.layers:
        raise ValueError(f"layer {layer} is not one of {shape.layers}")
    if first_head < 0 or heads < 1 or first_head + heads > shape.kv_heads:
        raise ValueError(
            f"heads {first_head}..{first_head + heads} are not of {shape.kv_heads} KV heads"
        )
    cut = slice(first_head * shape.head_dim, (first_head + heads) * shape.head_dim)
    if heads < shape.kv_heads and _mixes_heads(module, layer):
        raise ValueError(
            f"guard {module.name!r} mixes heads: a shard of {heads} of {shape.kv_heads} KV heads "
            "cannot apply it; gather the heads first"
        )
    noise, bottleneck, gate = float(module.config.noise), None, None
    if isinstance(module, ResidualGuard):
        names = [f.name for f in fields(Bottleneck)]
        bottleneck = Bottleneck(**{n: getattr(module, n)[layer].detach().float() for n in names})
    if isinstance(module, GateGuard):
        if decision is None:
            raise ValueError("guard 'gate' reads the whole segment: give decision=decide(...)")
        if decision.mask.forbid.any():
            gate = _gate_of(module, layer, decision, cut)
        else:  # what forbids nothing changes nothing
            noise = 0.0
    stream = None
    if noise and noise_key is not None:
        stream = NoiseStream(
            noise_key, layer, shape.layers, shape.kv_heads, first_head, first_token
        )
    center, scale = (t[layer, :, cut].float() for t in (module.center, module.scale))
    return TokenWork(center, scale, bottleneck, gate, noise, stream)


def _mixes_heads(module: GuardModule, layer: int) -> bool:
    if not isinstance(module, GateGuard):
        return isinstance(module, ResidualGuard)
    return module.config.maps != "per_head" and _maps_something(module, layer)


def _maps_something(module: GateGuard, layer: int) -> bool:
    kind = module.config.maps
    return not all(
        channel_maps.is_identity(kind, m[layer]) for m in (module.squeeze, module.expand)
    )


def _gate_of(module: GateGuard, layer: int, decision: Decision, cut: slice) -> Gate:
    squeeze = expand = None
    if _maps_something(module, layer):
        squeeze, expand = (
            channel_maps.dense(module.config.maps, m[layer].detach().float())[:, cut, cut]
            for m in (module.squeeze, module.expand)
        )
    codebook = module.codebook[:, layer, :, cut].detach().float()
    return Gate(
        decision.closed[:, layer].float(), decision.words.float(), codebook, squeeze, expand
    )
