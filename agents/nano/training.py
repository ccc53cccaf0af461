"""Trains the nano agent from scratch to answer questions about records that it has read.

One row of a batch is one or two contexts followed by several packed questions, each of which sees
the contexts and itself alone. Two contexts are prefilled independently, as two consumed segments
are, or one after the other. The loss is the cross-entropy of the answers.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lcguard.agents.nano.tokenizer import train_tokenizer
from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.generator import GeneratorConfig, make_record
from lcguard.agents.scenarios.types import EdgeSpec, Hop
from lcguard.records import IGNORE, TokenRecord, additive, pack_questions, pad
from lcguard.rule import Rule
from lcguard.training.checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class NanoConfig:
    """Everything that makes the nano agent; unknown keys are refused by the loader."""

    seed: int = 0
    vocab_size: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    max_positions: int = 8192
    rope_theta: float = 10_000.0
    steps: int = 2600
    batch: int = 32
    questions: int = 8
    """Most questions a row."""
    two_contexts: float = 0.15
    """Share of rows with two contexts."""
    lr: float = 3e-3
    muon_lr: float = 0.02
    warmup: int = 100
    cooldown: float = 0.4
    """Last share of the steps in which the learning rate falls to zero."""
    short_steps: int = 600
    """Steps with short records at the start."""
    coined_start: int = 1000
    """Step from which half of the names are coined (see ``values``)."""
    save_every: int = 250
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


def model_config(config: NanoConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp,
        tie_word_embeddings=True,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attention_bias=False,
        use_sliding_window=False,
    )


@dataclass(frozen=True)
class Batch:
    """One training batch; S is contexts and questions together."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    """``[B, 1, S, S]`` bool."""
    labels: Tensor


def collate(rows: list[list[TokenRecord]], joint: list[bool], pad_id: int) -> Batch:
    """Contexts, then packed questions of all contexts of a row."""
    context = pad([[t for r in row for t in r.ids] for row in rows], pad_id)
    valid = pad([[1 for r in row for _ in r.ids] for row in rows], 0).bool()
    part = pad([[i for i, r in enumerate(row) for _ in r.ids] for row in rows], -1)
    merged = [
        TokenRecord("", "", "", "", "", (), (), tuple(q for r in row for q in r.questions), Rule())
        for row in rows
    ]
    packed = pack_questions(merged, pad_id=pad_id)
    n = context.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    same = part[:, :, None] == part[:, None, :]
    allowed = causal & (same | torch.tensor(joint)[:, None, None]) & valid[:, None, :]
    allowed = allowed | torch.eye(n, dtype=torch.bool)
    top = torch.cat((allowed, torch.zeros(len(rows), n, packed.ids.shape[1], dtype=torch.bool)), -1)
    mask = torch.cat((top[:, None], packed.mask(valid)), 2)
    positions = torch.cat((torch.arange(n).expand(len(rows), n), packed.positions(valid.sum(1))), 1)
    labels = torch.cat((torch.full_like(context, IGNORE), packed.labels), 1)
    return Batch(torch.cat((context, packed.ids), 1), positions, mask, labels)


class Rows(IterableDataset[Batch]):
    """Endless stream of training batches, made in a worker process."""

    def __init__(self, config: NanoConfig, encoder: Encoder, start: int = 0) -> None:
        self.config, self.encoder, self.start = config, encoder, start

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> Batch:
        c = self.config
        rng = random.Random(f"{c.seed}/{step}")
        g = c.generator
        if step < c.short_steps:  # copying is learned sooner where there is less to search
            g = replace(g, min_fields=2, max_fields=3, filler=1, absent_questions=0)
        if step >= c.coined_start and g.split == "train":
            g = replace(g, split="coined")
        # all rows of a batch alike, or most of it would be padding
        n = 2 if rng.random() < c.two_contexts else 1
        rows = [n] * (c.batch // n)
        joint = [rng.random() < 0.5 for _ in rows]
        edge = EdgeSpec("", "", Rule())
        hops = [Hop("", edge, make_record(rng, g, "")) for _ in range(sum(rows))]
        records = iter(self.encoder.encode(hops))
        out = []
        for n in rows:
            row = [next(records) for _ in range(n)]
            if n == 2 and row[0].record_type == row[1].record_type:
                row = row[:1]  # nothing would tell whose field is meant
            out.append([_fewer(rng, r, max(1, c.questions // len(row))) for r in row])
        return collate(out, joint, self.encoder.tokenizer.pad_token_id)


def _fewer(rng: random.Random, record: TokenRecord, n: int) -> TokenRecord:
    questions = record.questions
    if len(questions) > n:
        questions = tuple(rng.sample(questions, n))
    return replace(record, questions=questions)


def answer_logits(model: Qwen3ForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[N, V]`` and labels ``[N]`` at the answer tokens alone."""
    hidden = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=additive(batch.mask, torch.float32),
        use_cache=False,
    ).last_hidden_state
    due = batch.labels != IGNORE
    return model.lm_head(hidden[due]), batch.labels[due]


def optimizers(model: nn.Module, config: NanoConfig) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(config: NanoConfig, step: int) -> float:
    """Warm-up, flat, then linear to zero."""
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return min(1.0, (step + 1) / config.warmup, max(left, 0.0))


def train(
    config: NanoConfig,
    out: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    init: Qwen3ForCausalLM | None = None,
) -> Qwen3ForCausalLM:
    """Trains and writes ``out``, an ordinary model folder, with ``train_log.jsonl`` beside it.

    Batches are a function of the step, so a run that was killed resumes from its last checkpoint
    with the data that it would have seen. Raises ``ValueError`` where the loss is not finite.
    """
    torch.manual_seed(config.seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or train_tokenizer(config.vocab_size, 20_000, config.seed)
    tokenizer.save_pretrained(out)
    model = init or Qwen3ForCausalLM(model_config(config, tokenizer))
    model.train()
    (out / "train_config.json").write_text(json.dumps(asdict(config), indent=1))
    opts = optimizers(model, config)
    base = [group["lr"] for o in opts for group in o.param_groups]
    state, first, seen, spent = out / "checkpoint.safetensors", 0, 0, 0.0
    if state.exists():
        meta = load_checkpoint(state, {"model": model}, opts)
        first, seen, spent = meta["step"], meta["tokens"], meta["seconds"]
    rows = Rows(config, Encoder(tokenizer), first)
    loader = DataLoader(rows, batch_size=None, num_workers=1, prefetch_factor=8)
    started, running = time.monotonic() - spent, 0.0
    _keep_log(out / "train_log.jsonl", first)
    with (out / "train_log.jsonl").open("a") as log:
        for step, batch in zip(range(first, config.steps), loader, strict=False):
            factor = schedule(config, step)
            for lr, group in zip(base, (g for o in opts for g in o.param_groups), strict=True):
                group["lr"] = lr * factor
            loss, right = update(model, batch, opts, step)
            seen += int(batch.ids.numel())
            running = right if step == first else 0.95 * running + 0.05 * right
            seconds = time.monotonic() - started
            if step % 20 == 0 or step == config.steps - 1:
                row: dict[str, Any] = {
                    "step": step,
                    "loss": round(loss, 4),
                    "token_accuracy": round(running, 4),
                    "tokens": seen,
                    "seconds": round(seconds, 1),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
            if (step + 1) % config.save_every == 0:
                meta = {"step": step + 1, "tokens": seen, "seconds": seconds}
                save_checkpoint(state, {"model": model}, opts, meta)
                model.save_pretrained(out)
    model.save_pretrained(out)
    state.unlink(missing_ok=True)
    return model


def _keep_log(path: Path, steps: int) -> None:
    """Drops the lines that a killed run wrote after its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and steps else []
    kept = [line for line in lines if json.loads(line)["step"] < steps]
    path.write_text("".join(f"{line}\n" for line in kept))


def update(
    model: Qwen3ForCausalLM, batch: Batch, opts: list[torch.optim.Optimizer], step: int
) -> tuple[float, float]:
    """One step; returns the loss in nats and the share of answer tokens right."""
    logits, labels = answer_logits(model, batch)
    loss = nn.functional.cross_entropy(logits, labels)
    if not math.isfinite(loss.item()):
        raise ValueError(f"loss is {loss.item()} at step {step}; lower lr or muon_lr")
    for o in opts:
        o.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for o in opts:
        o.step()
    return loss.item(), float((logits.argmax(-1) == labels).float().mean())
