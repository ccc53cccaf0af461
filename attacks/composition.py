"""Composition: one attacker reads every segment of a path or a graph together.

What a single segment hides can follow from several: the same value under two policies, a trace in
a later agent's own tokens, an identifier here and a sensitive fact there (arXiv 2605.22786 calls
the observed set M_obs; arXiv 2509.14284). The decoder attack over the joint segment, told which
segment each token belongs to; fields are ``agent.field``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.attacks.base import register
from lcguard.attacks.decoder import DecoderAttack
from lcguard.protocols import AttackData


@register("composition")
class CompositionAttack(DecoderAttack):
    goal = "recover forbidden values from all segments of a path or graph together"
    reference = "arXiv 2605.22786 (Full-System) and 2509.14284, as a decoder over joint segments"
    reads_joint = True

    @dataclass(frozen=True)
    class Config(DecoderAttack.Config):
        max_segments: int = 16
        """Segments told apart; those beyond share the last mark."""

    @classmethod
    def clean_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in options.items() if k != "max_segments"}

    def start(self, pairs: AttackData, *, seed: int = 0) -> None:
        """As the decoder; warm, it may start from a decoder fitted on single segments.

        Segment marks start at zero weight, and ``agent.field`` as what the decoder knows of
        ``field``. Raises ``ValueError`` for a decoder of another size.
        """
        warm = self.warm
        if warm is None or isinstance(warm, CompositionAttack):
            return super().start(pairs, seed=seed)
        self.warm = None
        super().start(pairs, seed=seed)
        self.warm = warm
        own, known = self.network.state_dict(), warm.network.state_dict()
        for name, value in known.items():
            if name == "writer.field.weight":
                for full, row in self.fields.items():
                    single = warm.fields.get(full.split(".", 1)[-1], len(warm.fields))
                    own[name][row] = value[single]
            elif name == "reader.read.weight":
                own[name].zero_()
                own[name][:, : value.shape[1]] = value
            elif name in ("reader.center", "reader.scale"):
                own[name][: len(value)] = value
            elif own[name].shape == value.shape:
                own[name].copy_(value)
            else:
                raise ValueError(
                    f"the warm decoder's {name} is {tuple(value.shape)}, not "
                    f"{tuple(own[name].shape)}: give both the same width and blocks"
                )
        self.network.load_state_dict(own)

    def inputs(self, batch: AttackData) -> Tensor:
        """Features and the token's segment as one-hot, ``[B, T, channels + max_segments]``.

        Pairs without ``segments`` are single ones.
        """
        features = super().inputs(batch)
        limit = int(self.config.max_segments)
        segments = batch.segments
        if segments is None:
            segments = torch.zeros(features.shape[:2], dtype=torch.long)
        owner = segments[:, : features.shape[1]].clamp_max(limit - 1).to(features.device)
        owner = F.pad(owner, (0, features.shape[1] - owner.shape[1]))
        return torch.cat((features, F.one_hot(owner, limit).to(features.dtype)), -1)
