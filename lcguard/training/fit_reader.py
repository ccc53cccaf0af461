"""Fits low-rank adapters (LoRA, arXiv 2106.09685) with which a model reads a segment's KV.

Only the receiver's own tokens, questions and answers, pass through the adapted weights; the segment
is what the plain model made. So an adapter changes nothing of what senders publish or guards see:
a model that answers tersely (``scripts/train_reader.py``), or an attacker's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lcguard.protocols import KVBatch
from lcguard.records import IGNORE, PackedQuestions
from lcguard.source import ModelSource
from lcguard.training.descent import Descent

Draw = Callable[[int], tuple[KVBatch, PackedQuestions]]
"""Segments and questions, with their answers, of a step."""
Say = Callable[[int, float], None]


@dataclass(frozen=True)
class ReaderConfig:
    rank: int = 8
    alpha: int = 16
    steps: int = 150
    lr: float = 1e-3
    warmup: int = 10
    seed: int = 0
    start: str = ""
    """Folder of adapters to go on from, whose ``rank`` and ``alpha`` hold; empty starts anew."""


def adapted(model: Any, config: ReaderConfig) -> Any:
    """A copy of a causal LM with adapters on every linear layer, only they trainable.

    Raises ``ValueError`` where peft is not installed, or ``config.start`` does not fit the model.
    """
    peft = _peft()
    torch.manual_seed(config.seed)
    if config.start:
        return _with_adapters(model, config.start, is_trainable=True)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(copy.deepcopy(model), lora)


def fit_reader(
    source: ModelSource, draw: Draw, config: ReaderConfig, say: Say = lambda step, loss: None
) -> Any:
    """Adapters trained to answer, on top of what answers now; a model of peft's. ``source`` stays
    as it is.

    Raises ``ValueError`` where a step has no answer to learn, or the loss is not finite.
    """
    model = adapted(source.reader, config).to(source.device)
    reader = ModelSource(source.model, source.pad_id, reader=model.base_model.model)
    weights = [p for p in model.parameters() if p.requires_grad]
    descent = Descent(weights, config.steps, config.lr, config.warmup)
    for step in range(config.steps):
        kv, packed = draw(step)
        due = packed.labels[packed.labels != IGNORE].to(source.device)
        if not due.numel():
            raise ValueError(f"step {step} has no question with an answer")
        loss = F.cross_entropy(reader.answer_logits(kv, packed).float(), due)
        say(step, descent.down(step, loss))
    return model.eval()


def merged(model: Any) -> Any:
    """The adapted model as one without adapters, which computes the same."""
    return model.merge_and_unload().eval().requires_grad_(False)


def load_reader(model: Any, folder: Path) -> Any:
    """A copy of the model with the adapters of a folder merged in.

    Raises ``ValueError`` where peft is not installed, or the folder does not fit the model.
    """
    return merged(_with_adapters(model, folder))


def _with_adapters(model: Any, folder: str | Path, **options: Any) -> Any:
    """A copy of the model that has a folder's adapters."""
    peft = _peft()
    if not Path(folder).is_dir():  # else peft looks for it on the hub
        raise ValueError(f"the reader {folder} does not exist: give a folder of adapters")
    try:
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder), **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the reader {folder} does not fit the model: {error}") from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("adapters need peft: pip install 'lcguard[real]'") from error
    return peft
