"""Joint segments, and a training step over paths (Full-System)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.guards.base import KVShape, guard_class
from lcguard.protocols import KVBatch
from lcguard.records import IGNORE
from lcguard.training.config import PolicyMix, TrainConfig
from lcguard.training.dataset import attack_data, with_policy
from lcguard.training.joint import join_data, observed
from lcguard.training.objective import Objective
from lcguard.training.steps import Steps
from lcguard.training.twins import ValuePool
from tests.fixtures import World, random_kv


class TestKVBatch:
    def test_join_leaves_no_gaps(self) -> None:
        a, b = random_kv((3, 5), seed=1), random_kv((4, 1), seed=2)
        joint = KVBatch.join([a, b])
        assert joint.valid.sum(1).tolist() == [7, 6]
        for row, (n, m) in enumerate(((3, 4), (5, 1))):
            whole = torch.cat((a.keys[row][..., :n, :], b.keys[row][..., :m, :]), -2)
            assert torch.equal(joint.keys[row][..., : n + m, :], whole)

    def test_stack_pads(self) -> None:
        a, b = random_kv((3, 5), seed=1), random_kv((9,), seed=2)
        both = KVBatch.stack([a, b])
        assert both.valid.sum(1).tolist() == [3, 5, 9]
        assert torch.equal(both[2:].values, b.values)
        for make in (KVBatch.join, KVBatch.stack):
            with pytest.raises(ValueError, match="give at least one"):
                make([])


def test_prefill_behind_segments_is_reading_on(world: World) -> None:
    first, second = ([r.ids for r in world.records[i : i + 3]] for i in (0, 3))
    on = world.source.prefill(first)
    behind = KVBatch.join([on, world.source.prefill(second, on=on)])
    whole = world.source.prefill([(*a, *b) for a, b in zip(first, second, strict=True)])
    assert torch.equal(behind.valid, whole.valid)
    assert torch.allclose(behind.keys, whole.keys, atol=1e-4)
    assert torch.allclose(behind.values, whole.values, atol=1e-4)
    alone = world.source.prefill(second)
    assert not torch.allclose(world.source.prefill(second, on=on).values, alone.values, atol=1e-2)


class TestJoinData:
    def test_secrets_stand_where_they_are_said_to(self, world: World) -> None:
        groups = [world.records[:4], world.records[4:8]]
        parts = [
            attack_data(g, world.source.prefill([r.ids for r in g]), world.special) for g in groups
        ]
        joint = join_data(parts, ["one", "two"], [f"s{i}" for i in range(4)])
        for i in range(4):
            ids = (*groups[0][i].ids, *groups[1][i].ids)
            assert joint.context_ids[i, : len(ids)].tolist() == list(ids)
            assert (joint.context_ids[i, len(ids) :] == IGNORE).all()
            for s in joint.secrets[i]:
                start, end = s.positions
                assert ids[start:end] == s.ids
                part = 0 if s.field.startswith("one.") else 1
                assert set(joint.segments[i, start:end].tolist()) == {part}
            assert len(joint.secrets[i]) == sum(len(g[i].secrets()) for g in groups)
            assert len(joint.prompts[i]) == len(joint.secrets[i])
        assert joint.record_ids == ["s0", "s1", "s2", "s3"]
        assert joint.subset([2]).segments.shape[0] == 1
        assert joint.subset([2, 0]).record_ids == ["s2", "s0"]

    def test_a_batch_of_paths(self, world: World) -> None:
        records = world.records[:6]
        kv = world.source.prefill([r.ids for r in records])
        paths = observed(records, kv, world.special, 3)
        assert len(paths) == 2
        ids = [t for k in (1, 3, 5) for t in records[k].ids]
        assert paths.context_ids[1, : len(ids)].tolist() == ids
        alone = observed(records, kv, world.special, 1)
        assert len(alone) == 6


class TestStep:
    def config(self, **changes: object) -> TrainConfig:
        return replace(
            TrainConfig(guard="gate", batch=8, path_hops=2, policies=PolicyMix(1.0, 0.0)),
            **changes,  # type: ignore[arg-type]
        )

    def step(self, world: World, config: TrainConfig) -> object:
        torch.manual_seed(0)
        module = guard_class("gate").build(
            KVShape(*world.source.shape), len(CATEGORIES), {"width": 32, "blocks": 1, "noise": 0.1}
        )
        module.fit_statistics(world.source.prefill([r.ids for r in world.records[:20]]))
        records = sorted(world.records, key=lambda r: len(r.ids))
        rng, noise = random.Random(0), torch.Generator().manual_seed(0)
        pool = ValuePool(records)
        steps = Steps(records, pool, world.source, config, world.special.neutral_id)
        data = steps.draw(rng, module, noise, 0)
        losses = Objective(config, world.source, pool).losses(module, data, noise, 0)
        return data, losses, module

    def test_later_hops_are_made_behind_guarded_ones(self, world: World) -> None:
        data, losses, _ = self.step(world, self.config())  # type: ignore[misc]
        assert len(data.records) == 8
        alone = world.source.prefill([r.ids for r in data.records])
        for row, (record, fresh) in enumerate(zip(data.records, alone.values, strict=True)):
            n = len(record.ids)
            same = torch.allclose(data.raw.values[row][..., :n, :], fresh[..., :n, :], atol=1e-4)
            assert same is (row < 4)
        assert torch.equal(data.raw.valid, data.pair.valid)
        assert losses.metrics["pair_nats"] > 0
        assert data.before is None

    def test_a_merged_receiver_reads_what_came_before(self, world: World) -> None:
        data, losses, module = self.step(world, self.config(merge_rate=1.0))  # type: ignore[misc]
        assert data.before.valid[:4].sum() == 0
        assert data.before.valid[4:].sum(1).tolist() == [len(r.ids) for r in data.records[:4]]
        for own, other in zip(data.records[4:], data.records[:4], strict=True):
            assert not {q.field for q in own.questions} & {s.field for s in other.spans}
        losses.total.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    def test_per_agent_is_one_hop(self, world: World) -> None:
        data, _, _ = self.step(world, self.config(path_hops=1))  # type: ignore[misc]
        alone = world.source.prefill([r.ids for r in data.records])
        assert torch.allclose(data.raw.values, alone.values, atol=1e-4)

    def test_whole_paths_only(self) -> None:
        with pytest.raises(ValueError, match="batch=8 must be a multiple of path_hops=3"):
            self.config(path_hops=3)
        with pytest.raises(ValueError, match=r"merge_rate=2 must be within 0\.\.1"):
            self.config(merge_rate=2)


def test_more_policies_more_hidden(world: World) -> None:
    one, two = (with_policy(world.records[:2], c) for c in (("person",), ("health",)))
    kv = world.source.prefill([r.ids for r in world.records[:2]])
    joint = join_data([attack_data(r, kv, world.special) for r in (one, two)], ["x", "y"])
    forbidden = {CATEGORIES[i] for i in joint.mask.forbid[0].nonzero().flatten().tolist()}
    assert forbidden == {"person", "health"}
