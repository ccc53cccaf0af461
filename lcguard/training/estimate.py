"""What a training of a guard takes, before it is started: memory and time.

Both grow with the batch. Memory: the process itself (torch, transformers), the frozen model's
weights, and what backpropagation through it keeps for each record, layer and hidden channel. Time:
each record passes each parameter. The constants are those of preset ``gate`` on SmolLM2-135M,
fitted to two figures of memory (1.8 GiB of peak resident memory at batch 2; 11.3 GB at batch 32, an
older figure) and to one of time (50 s a step at batch 32 on two CPU cores without AVX-512); with
them the nano agent (1.0 M) comes out at 0.4 s a step, as it was measured (6.5 minutes for 900
steps). Records were some hundred tokens long; longer ones take more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

_PROCESS_BYTES = 750e6
"""Of a process that has loaded everything but a model."""
_KEPT_BYTES = 18_100.0
"""For each record, layer and hidden channel."""
_RECORD_PARAMETER_S = 1.16e-8
"""On two CPU cores."""
_LARGEST = 32


@dataclass(frozen=True)
class Estimate:
    """Of one training."""

    bytes: float
    step_s: float
    """On two CPU cores; on a GPU it was not measured."""

    def line(self, steps: int) -> str:
        """For people."""
        return (
            f"about {self.bytes / 2**30:.1f} GiB of memory, and {self.step_s:.2g} s a step on two "
            f"CPU cores: {self.step_s * steps / 60:.0f} min for {steps} steps (not measured on a "
            "GPU)"
        )


def parameters_of(config: Any) -> int:
    """Of a causal LM with this configuration, as far as it is told by it."""
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or hidden // heads)
    kv = int(getattr(config, "num_key_value_heads", None) or heads)
    attention = hidden * dim * (2 * heads + 2 * kv)
    mlp = 3 * hidden * int(config.intermediate_size)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return layers * (attention + mlp) + int(config.vocab_size) * hidden * (1 if tied else 2)


def estimate(config: Any, batch: int) -> Estimate:
    """``config``: the text model's of transformers."""
    parameters = parameters_of(config)
    kept = _KEPT_BYTES * batch * int(config.num_hidden_layers) * int(config.hidden_size)
    memory = _PROCESS_BYTES + 4.0 * parameters + kept
    return Estimate(memory, _RECORD_PARAMETER_S * batch * parameters)


def fitting_batch(config: Any, memory_bytes: float) -> int:
    """The largest power of two, at most 32, whose training takes half of the memory; at least 1."""
    batch = _LARGEST
    while batch > 1 and estimate(config, batch).bytes > memory_bytes / 2:
        batch //= 2
    return batch


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
