"""Rotary position embedding, taken off and put back on exactly.

A cached key is ``k' = m R(p) k``: R(p) turns the pair ``(i, i + R/2)`` by the angle ``p * w_i``
(RoFormer, arXiv 2104.09864, in the half-split layout of the Llama family) and m is YaRN's attention
scaling (arXiv 2309.00071; 1 for every other kind). A segment stores k, so ``unrotate`` turns back
and divides by m, and ``rotate`` places the key at the receiver's position. Frequencies come from
transformers' own functions, and angles are formed in float32 as its models form them: un-rotation
then inverts what the sender's model did, whatever the position.

Only kinds with one fixed frequency table are supported. Dynamic NTK and LongRoPE choose the table
by sequence length, M-RoPE has three positions per token, and some models use one table per layer
type: each of these is refused by name, as are model families whose pair layout or order of norm
and rotation was not proved by tests/core/test_rope.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lcguard.canonical import canonical_digest

KINDS = ("default", "linear", "llama3", "yarn")
"""Values of ``rope_type`` with one fixed frequency table."""

MODEL_TYPES: Mapping[str, bool] = {
    "gemma": False,
    "gemma2": False,
    "granite": False,
    "llama": False,
    "mistral": False,
    "mixtral": False,
    "olmo2": False,
    "phi3": True,
    "qwen2": False,
    "qwen2_moe": False,
    "qwen3": False,
    "qwen3_moe": False,
    "starcoder2": False,
}
"""``model_type`` -> whether the family reads ``partial_rotary_factor``. One row = one proved row of
tests/core/test_rope.py: keys cached after the key norm and rotation, half-split pairs, every layer
rotated."""

_REFUSED_TYPES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "codegen",
            "cohere",
            "cohere2",
            "cohere2_moe",
            "ernie4_5",
            "ernie4_5_moe",
            "glm",
            "glm4",
            "gptj",
            "helium",
            "llama4_text",
        ),
        "rotates interleaved pairs (2i, 2i + 1), not half-split ones",
    ),
    **dict.fromkeys(
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "llama4", "nanochat"),
        "normalises keys after rotation, so the cached key is not a rotated one",
    ),
    "smollm3": "leaves some layers without rotation (no_rope_layers)",
}


class UnsupportedModelError(ValueError):
    """A model whose KV cannot be made position-free exactly. Names the value and the fix."""


def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The flat ``rope_parameters`` of a config. Raises ``UnsupportedModelError`` for others."""
    raw = getattr(config, "rope_parameters", None)
    if not isinstance(raw, Mapping) or not raw:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} has rope_parameters={raw!r}: "
            "give the text config of a model with rotary embeddings"
        )
    nested = sorted(k for k, v in raw.items() if isinstance(v, Mapping))
    if nested:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} has one RoPE per layer type {nested}: "
            "use a model with one RoPE for all layers"
        )
    params = {k: v for k, v in raw.items() if v is not None and k != "type"}
    kind = params.setdefault("rope_type", raw.get("type", "default"))
    if "mrope_section" in params or kind == "mrope":
        raise UnsupportedModelError(
            f"M-RoPE (mrope_section={params.get('mrope_section')}) has several positions per token:"
            " use a text-only model"
        )
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"rope_type={kind!r} has no single fixed frequency table: use one of {', '.join(KINDS)}"
        )
    # 10000 and 10000.0 are one parameter and must have one digest.
    return {k: float(v) if type(v) is int else v for k, v in params.items()}


def _check_family(config: PretrainedConfig, partial_factor: float) -> None:
    """Refuses families whose cached keys were not proved to be half-split rotations."""
    kind = config.model_type
    if kind in _REFUSED_TYPES:
        raise UnsupportedModelError(
            f"model_type={kind!r} {_REFUSED_TYPES[kind]}: use one of {', '.join(MODEL_TYPES)}"
        )
    if kind not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"model_type={kind!r} was not proved: use one of {', '.join(MODEL_TYPES)}, or add a row"
            " to lcguard.rope.MODEL_TYPES and to tests/core/test_rope.py and run it"
        )
    # Families that ignore the factor for the default kind would rotate all of the head.
    if partial_factor != 1 and not MODEL_TYPES[kind]:
        raise UnsupportedModelError(
            f"partial_rotary_factor={partial_factor} has no effect in model_type={kind!r}: "
            "set it to 1.0"
        )


@dataclass(frozen=True)
class Rotary:
    """The rotation of one model: ``Rotary.from_config(model.config)``."""

    kind: str
    """``rope_type``: default, linear, llama3 or yarn."""
    head_dim: int
    """D."""
    inv_freq: tuple[float, ...]
    """Angle per position in radians, one per pair: half of the rotated dimensions."""
    attention_scaling: float = 1.0
    """Factor that the model puts on rotated queries and keys (YaRN's mscale)."""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """``rope_parameters`` as configured."""

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Rotary:
        """Reads the rotation of ``config``.

        Raises:
            UnsupportedModelError: a RoPE kind or a model family that is not exactly reversible.
        """
        params = _rope_parameters(config)
        factor = float(params.get("partial_rotary_factor", 1.0))
        _check_family(config, factor)
        head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        kind = str(params["rope_type"])
        if kind == "default":
            # Not in ROPE_INIT_FUNCTIONS since transformers 5: each model class has its own copy.
            dim = int(head_dim * factor)
            exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
            inv_freq, scaling = 1.0 / (params["rope_theta"] ** exponent), 1.0
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
            params = _rope_parameters(config)  # the call fills in defaults
        if kind == "yarn":
            # YaRN without a factor derives it from this length.
            params["max_position_embeddings"] = float(config.max_position_embeddings)
        return cls(kind, head_dim, tuple(inv_freq.tolist()), float(scaling), params)

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions: the first ``rotary_dim`` of D."""
        return 2 * len(self.inv_freq)

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Places position-free keys ``[..., T, D]`` at ``positions``.

        Args:
            keys: floating point; any leading dimensions.
            positions: integers, ``[T]`` or broadcastable to ``[..., T]``.

        Returns:
            Keys as the model caches them, in the dtype of ``keys``. Differentiable.
        """
        return self._turn(keys, positions, 1.0, self.attention_scaling)

    def unrotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Takes position and attention scaling off cached keys ``[..., T, D]``; see ``rotate``."""
        return self._turn(keys, positions, -1.0, 1.0 / self.attention_scaling)

    def describe(self) -> dict[str, Any]:
        """JSON-able parameters: equal for equal rotations.

        Frequencies are left out: they follow from the rest, and their last bit may differ between
        processors.
        """
        return {
            "kind": self.kind,
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary_dim,
            "attention_scaling": round(self.attention_scaling, 9),
            "parameters": dict(sorted(self.parameters.items())),
        }

    @property
    def digest(self) -> str:
        """SHA-256 of ``describe()``, hexadecimal."""
        return canonical_digest(self.describe())

    def _turn(self, keys: Tensor, positions: Tensor, sign: float, scale: float) -> Tensor:
        if keys.shape[-1] != self.head_dim:
            raise ValueError(f"keys have D={keys.shape[-1]}, this rotation D={self.head_dim}")
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ValueError(f"positions are {positions.dtype}: give integers")
        if not positions.ndim or positions.shape[-1] not in (1, keys.shape[-2]):
            raise ValueError(
                f"positions {tuple(positions.shape)} do not fit keys {tuple(keys.shape)}: "
                "their last dimension is T"
            )
        compute = torch.float64 if keys.dtype == torch.float64 else torch.float32
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=keys.device)
        # float32 product even for float64 keys: the models form their angles so.
        angle = positions.to(keys.device).unsqueeze(-1).float() * inv_freq
        cos = angle.to(compute).cos() * scale
        sin = angle.to(compute).sin() * (scale * sign)
        half = len(self.inv_freq)
        # both halves at once: the same bits as half by half, in half the time
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        pairs = keys[..., : 2 * half].to(compute)
        turned = pairs * cos + pairs.roll(half, -1) * sin
        if 2 * half == self.head_dim:
            return turned.to(keys.dtype)
        return torch.cat((turned.to(keys.dtype), keys[..., 2 * half :]), -1)
