"""Adapters for reading: they learn, they leave what senders publish alone, and they are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcguard.protocols import KVBatch
from lcguard.records import IGNORE, PackedQuestions, pack_questions
from lcguard.source import ModelSource
from lcguard.training.fit_reader import ReaderConfig, fit_reader, load_reader, merged
from scripts.train_reader import average
from tests.fixtures import World

CONFIG = ReaderConfig(rank=4, steps=30, lr=1e-2, warmup=2)


def lesson(world: World) -> tuple[KVBatch, PackedQuestions]:
    records = world.records[:8]
    kv = world.source.prefill([r.ids for r in records])
    return kv, pack_questions(records, lambda r, q: q.kind == "direct", world.source.pad_id)


def nats(source: ModelSource, world: World) -> float:
    kv, packed = lesson(world)
    due = packed.labels[packed.labels != IGNORE]
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(source.answer_logits(kv, packed), due))


def with_reader(world: World, reader: object) -> ModelSource:
    return ModelSource(world.source.model, world.source.pad_id, reader=reader)


@pytest.fixture(scope="module")
def tuned(world: World) -> object:
    return fit_reader(world.source, lambda step: lesson(world), CONFIG)


def test_it_learns_to_answer(world: World, tuned: object) -> None:
    adapted = with_reader(world, tuned.base_model.model)  # type: ignore[attr-defined]
    assert nats(adapted, world) < 0.92 * nats(world.source, world)


def test_what_senders_publish_stays(world: World, tuned: object) -> None:
    kv, _ = lesson(world)
    again = with_reader(world, tuned).prefill([r.ids for r in world.records[:8]])
    assert torch.equal(again.keys, kv.keys)
    assert torch.equal(again.values, kv.values)


def test_adapters_come_back_from_their_folder(world: World, tuned: object, tmp_path: Path) -> None:
    tuned.save_pretrained(str(tmp_path))  # type: ignore[attr-defined]
    back = with_reader(world, load_reader(world.source.model, tmp_path))
    whole = with_reader(world, merged(tuned))
    assert nats(back, world) == pytest.approx(nats(whole, world), abs=1e-4)


def test_adapters_of_another_model_are_refused(world: World, tuned: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit the model"):
        load_reader(world.source.model, tmp_path)


def test_nothing_to_learn_is_an_error(world: World) -> None:
    kv, packed = lesson(world)
    empty = PackedQuestions(
        packed.ids, packed.block, packed.step, torch.full_like(packed.labels, IGNORE)
    )
    with pytest.raises(ValueError, match="no question with an answer"):
        fit_reader(world.source, lambda step: (kv, empty), CONFIG)


def test_the_average_of_two_is_halfway(world: World, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        short = replace(CONFIG, seed=seed, steps=3)
        fit_reader(world.source, lambda step: lesson(world), short).save_pretrained(
            str(tmp_path / name)
        )
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    read = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "b", "mean")]
    for key, mean in read[2].items():
        half = (read[0][key] + read[1][key]) / 2
        assert torch.allclose(mean.float(), half, atol=1e-3)
    load_reader(world.source.model, tmp_path / "mean")  # fits the model
    wider = fit_reader(world.source, lambda step: lesson(world), replace(CONFIG, rank=2, steps=1))
    wider.save_pretrained(str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"a and .*c are adapters of different"):
        average([tmp_path / "a", tmp_path / "c"], tmp_path / "no")
    assert not (tmp_path / "no").exists()
