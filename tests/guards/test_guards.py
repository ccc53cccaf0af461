"""What every registered guard does and refuses; and what single guards are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.discrete_gaussian import STEPS
from lcguard.grid import noisy
from lcguard.guards.base import GuardModule, KVShape, guard_class, names
from lcguard.guards.cloak import CloakGuard
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.guards.gate import GateGuard
from lcguard.noise import noise_key, segment_noise
from lcguard.protocols import Guard, Guarded, KVBatch, Mask
from lcguard.records import masks
from lcguard.training.twins import neutral_twin
from tests.fixtures import World, forbid_all, make_records, random_kv
from tests.guards.every_guard import SHAPE, guard_of, guards_in, module_of
from tests.matrix import GUARDS

LENGTHS = (5, 9, 2)


NOISY = [n for n in GUARDS if n in ("gaussian", "gate", "trace_gate", "regress", "compose")]


OWN = [n for n in GUARDS if n != "redact"]


def apply(guard: FrozenGuard, kv: KVBatch, seed: int = 0, mask: Mask | None = None) -> Guarded:
    twin = random_kv(kv.valid.sum(1).tolist(), seed=99).to(kv.keys.dtype)
    keys = [noise_key(seed, str(row)) for row in range(len(kv))]
    return guard(kv, mask or forbid_all(len(kv)), keys=keys, twin=twin)


def same(a: KVBatch, b: KVBatch) -> bool:
    return torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_every_registered_guard_has_a_row() -> None:
    assert names() == sorted(GUARDS)


@pytest.mark.parametrize("name", GUARDS)
class TestEveryGuard:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keeps_shape_dtype_and_padding(self, name: str, dtype: torch.dtype) -> None:
        kv = random_kv(LENGTHS).to(dtype)
        out = apply(guard_of(name), kv)
        assert out.kv.keys.shape == out.kv.values.shape == kv.keys.shape
        assert out.kv.keys.dtype == out.kv.values.dtype == dtype
        assert torch.equal(out.kv.valid, kv.valid)
        padding = ~kv.valid[:, None, None, :, None].expand_as(kv.keys)
        assert not out.kv.keys[padding].any()
        assert not out.kv.values[padding].any()
        assert out.kv.keys[~padding].all()
        assert out.withheld.shape == kv.valid.shape
        assert bool(((out.withheld >= 0) & (out.withheld <= 1)).all())

    def test_is_a_function_of_its_input_and_the_seed(self, name: str) -> None:
        guard, kv = guard_of(name), random_kv(LENGTHS)
        first = apply(guard, kv, seed=3)
        torch.manual_seed(1234)  # the global generator has no say
        assert same(first.kv, apply(guard, kv, seed=3).kv)
        assert same(first.kv, apply(guard, kv, seed=4).kv) == (name not in NOISY)

    def test_padding_changes_nothing(self, name: str) -> None:
        """A record alone and in a padded batch: the same mean, garbage in the padding or not."""
        module, kv = module_of(name).eval(), random_kv(LENGTHS)
        garbage = 50.0 * ~kv.valid[:, None, None, :, None]
        dirty = KVBatch(kv.keys + garbage, kv.values - garbage, kv.valid)
        mask = forbid_all(len(kv))
        batch = module.rewrite(module.standardise(dirty), kv.valid, mask).mean
        for i, n in enumerate(LENGTHS):
            one = kv[i : i + 1].trim()
            alone = module.rewrite(module.standardise(one), one.valid, mask[i : i + 1]).mean
            torch.testing.assert_close(alone[0], batch[i, :n], atol=2e-5, rtol=1e-4)

    def test_is_frozen(self, name: str) -> None:
        guard = guard_of(name)
        assert isinstance(guard, Guard)
        assert not guard.module.training
        assert not any(p.requires_grad for p in guard.module.parameters())
        kv = random_kv(LENGTHS)
        kv.keys.requires_grad_()
        assert not apply(guard, kv).kv.keys.requires_grad

    def test_loads_as_saved(self, name: str, tmp_path: Path) -> None:
        guard, kv = guard_of(name), random_kv(LENGTHS)
        guard.save_pretrained(tmp_path / "new" / "guard")
        loaded = FrozenGuard.from_pretrained(
            tmp_path / "new" / "guard", model_digest="d" * 64, shape=SHAPE
        )
        if isinstance(loaded.module, CloakGuard):  # its key is on no card
            loaded.module.hold(bytes.fromhex(GUARDS[name]["key"]))
        assert same(apply(guard, kv).kv, apply(loaded, kv).kv)
        assert loaded.digest == guard.digest
        assert loaded.card.options == guard.module.options()
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["guard"]

    def test_unknown_option_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"'{name}' has no option 'colour'; it has: noise"):
            guard_class(name).build(SHAPE, len(CATEGORIES), {"colour": 1})

    @pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
    def test_impossible_noise_is_refused(self, name: str, noise: float) -> None:
        with pytest.raises(ValueError, match=r"noise .* must be a finite number"):
            guard_class(name).build(SHAPE, len(CATEGORIES), {**GUARDS[name], "noise": noise})

    def test_output_that_is_not_finite_is_refused(self, name: str) -> None:
        kv = random_kv(LENGTHS)
        kv.values[1, 0, 0, 3, 2] = float("nan")
        with pytest.raises(GuardError, match="not finite; withheld"):
            guard_of(name)(kv, forbid_all(3), twin=kv)

    def test_overflow_of_the_dtype_is_refused(self, name: str) -> None:
        guard, kv = guard_of(name), random_kv(LENGTHS).to(torch.float16)
        for m in guards_in(guard.module):
            m.center.fill_(1e6)  # cancels where the entry passes, overflows with any noise
            m.scale.fill_(1e6)
        if name in (
            "identity",
            "redact",
            "evict",
            "twin",
            "trace_gate",  # finds nothing in such KV
            "kveraser",
        ):  # nothing is computed, so nothing overflows
            assert same(guard(kv, forbid_all(3), twin=kv).kv, kv)
            return
        with pytest.raises(GuardError, match="not finite; withheld"):
            guard(kv, forbid_all(3))

    def test_foreign_kv_and_mask_are_refused(self, name: str) -> None:
        guard, kv = guard_of(name), random_kv(LENGTHS)
        other = random_kv(LENGTHS, (2, 1, 8))
        with pytest.raises(GuardError, match=r"\(2, 2, 8\), the segment has \(2, 1, 8\)"):
            guard(other, forbid_all(3), twin=other)
        with pytest.raises(GuardError, match="mask of shape"):
            guard(kv, forbid_all(2), twin=kv)


def test_same_seed_other_weights_other_digest() -> None:
    a, b = guard_of("gate"), guard_of("gate")
    assert a.digest == b.digest
    next(b.module.parameters()).data.flatten()[0] += 1e-3
    assert a.digest != b.digest
    assert a.digest != a.with_card(model_digest="e" * 64).digest


class TestRedact:
    def test_needs_its_twin(self) -> None:
        guard, kv = guard_of("redact"), random_kv(LENGTHS)
        with pytest.raises(GuardError, match="sends the twin's KV"):
            guard(kv, forbid_all(3))
        with pytest.raises(GuardError, match="2 twins for 3 segments"):
            guard(kv, forbid_all(3), twin=kv[:2])
        with pytest.raises(GuardError, match="is not KV of the model"):
            guard(kv, forbid_all(3), twin=random_kv(LENGTHS, (2, 1, 8)))

    def test_output_is_the_twin_whatever_the_segment(self) -> None:
        guard, twin = guard_of("redact"), random_kv((7, 3, 4), seed=5)
        for seed in (0, 1):
            out = guard(random_kv(LENGTHS, seed=seed), forbid_all(3), twin=twin)
            assert same(out.kv, twin)
            assert torch.equal(out.kv.valid, twin.valid)


class TestEvict:
    def test_own_entries_are_the_twins_and_later_ones_stay(self, world: World) -> None:
        """Later tokens were made with the value in sight: that is what the yardstick measures."""
        records = make_records(world.encoder, 6, seed=3)
        kv = world.source.prefill([r.ids for r in records])
        ids = [neutral_twin(r, r.forbid, world.special.neutral_id) for r in records]
        twin = world.source.prefill(ids, batch=1)  # another batch: the same tokens all the same
        module = guard_class("evict").build(KVShape(*world.source.shape), len(CATEGORIES), {})
        sent = FrozenGuard(module)(kv, masks(records), twin=twin).kv
        for i, (record, new) in enumerate(zip(records, ids, strict=True)):
            stays = torch.tensor([a == b for a, b in zip(record.ids, new, strict=True)])
            assert not stays.all()
            for got, raw, told in (
                (sent.keys, kv.keys, twin.keys),
                (sent.values, kv.values, twin.values),
            ):
                row, before, other = (x[i, :, :, : len(new)] for x in (got, raw, told))
                assert torch.equal(row[:, :, stays], before[:, :, stays])
                assert torch.equal(row[:, :, ~stays], other[:, :, ~stays])

    def test_a_twin_of_another_length_is_refused(self) -> None:
        with pytest.raises(GuardError, match="another length than the segment"):
            guard_of("evict")(random_kv(LENGTHS), forbid_all(3), twin=random_kv((5, 8, 2)))


def test_identity_is_exact() -> None:
    """Whatever its statistics: rounding would blur the yardstick."""
    kv = random_kv(LENGTHS)
    assert same(apply(guard_of("identity"), kv).kv, kv)
    assert not same(apply(guard_of("identity", noise=0.01), kv).kv, kv)


def test_residual_starts_as_the_identity() -> None:
    kv = random_kv(LENGTHS)
    fresh = FrozenGuard(guard_class("residual").build(SHAPE, len(CATEGORIES), {}))
    torch.testing.assert_close(apply(fresh, kv).kv.keys, kv.keys)
    assert (apply(guard_of("residual"), kv).kv.keys - kv.keys).abs().max() > 0.1


def test_gaussian_noise_has_the_size_it_says() -> None:
    module = module_of("gaussian", noise=0.7)
    kv = random_kv((400,) * 8)
    out = FrozenGuard(module)(kv, forbid_all(8)).kv
    z = module.standardise(out) - module.standardise(kv)
    assert float(z.std()) == pytest.approx(0.7, rel=0.02)
    assert float(z.mean().abs()) < 0.02


class TestGate:
    def forced(self, logit: float) -> GateGuard:
        """As it is made, but with every gate at this logit and words worth looking at."""
        module = GateGuard.build(SHAPE, len(CATEGORIES), GUARDS["gate"])
        with torch.no_grad():
            module.codebook.normal_()
            module.gate.weight.zero_()
            module.gate.bias.fill_(logit)
        return module.eval()

    def mean(self, module: GuardModule, kv: KVBatch, mask: Mask | None = None) -> torch.Tensor:
        mask = mask or forbid_all(len(kv))
        return module.rewrite(module.standardise(kv), kv.valid, mask).mean.detach()

    def test_closed_gate_tells_nothing(self) -> None:
        module = self.forced(20.0)
        first, second = (random_kv((6, 6), seed=s) for s in (0, 1))
        assert torch.equal(self.mean(module, first), self.mean(module, second))
        out = module(first, forbid_all(2), torch.Generator().manual_seed(0))[1]
        assert torch.equal(out.withheld, torch.ones(2, 6))

    def test_open_gate_is_the_identity_with_noise(self) -> None:
        module = self.forced(-20.0)
        kv = random_kv((6, 6))
        z = module.standardise(kv)
        assert torch.equal(self.mean(module, kv), z)
        keys = [noise_key(5, "a"), noise_key(5, "b")]
        out = FrozenGuard(module)(kv, forbid_all(2), keys=keys).kv
        noise = torch.stack([segment_noise(key, tuple(SHAPE), 6) for key in keys])
        wanted = noisy(z, 0.1, noise)
        torch.testing.assert_close(module.standardise(out), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(wanted, z + 0.1 / STEPS * noise, atol=0.1 / STEPS, rtol=0.0)

    def test_a_policy_that_forbids_nothing_changes_nothing(self) -> None:
        kv, forbidden = random_kv((6, 6)), forbid_all(2, derive=True)
        nothing = Mask(torch.zeros_like(forbidden.forbid), forbidden.derive)
        for module in (self.forced(20.0), module_of("gate").eval()):
            assert torch.equal(self.mean(module, kv, nothing), module.standardise(kv))
            assert not torch.allclose(self.mean(module, kv, forbidden), module.standardise(kv))
        quiet = FrozenGuard(module_of("gate", noise=0.0))
        torch.testing.assert_close(quiet(kv, nothing).kv.keys, kv.keys)

    def test_forbidding_more_withholds_more(self) -> None:
        module, kv = module_of("gate").eval(), random_kv((6,))
        last = torch.zeros(6)
        for n in range(len(CATEGORIES) + 1):
            forbid = torch.arange(len(CATEGORIES))[None] < n
            mask = Mask(forbid, torch.zeros_like(forbid))
            out = module.rewrite(module.standardise(kv), kv.valid, mask)
            withheld = out.withheld.detach()[0]
            assert bool((withheld >= last - 1e-6).all())
            last = withheld
        assert float(last.mean()) > 0.5

    def test_words_need_a_derived_category(self) -> None:
        """Word 0 alone, unless a category is both forbidden and derived."""
        module, kv = self.forced(20.0), random_kv((6, 6))
        constant = module.codebook[0].expand(2, 6, -1, -1, -1).detach()
        forbidden, derived = forbid_all(2), forbid_all(2, derive=True)
        assert torch.equal(self.mean(module, kv, forbidden), constant)
        assert not torch.allclose(self.mean(module, kv, derived), constant, atol=1e-2)
        mixed = Mask(forbidden.forbid, torch.stack((forbidden.derive[0], derived.derive[0])))
        out = self.mean(module, kv, mixed)
        assert torch.equal(out[0], constant[0])
        assert not torch.allclose(out[1], constant[1], atol=1e-2)

    def test_gradient_passes_the_clamp(self) -> None:
        """A gate that is shut or wide open can still move."""
        for logit in (8.0, -8.0):
            module = self.forced(logit).requires_grad_()
            kv = random_kv((6,))
            for derive in (False, True):
                mask = forbid_all(1, derive=derive)
                withheld = module.rewrite(module.standardise(kv), kv.valid, mask).withheld
                assert set(withheld.flatten().tolist()) == {float(logit > 0)}
                withheld.sum().backward()
            assert module.gate.bias.grad is not None
            assert float(module.gate.bias.grad.abs().min()) > 0

    def test_learns_to_obey_the_mask(self) -> None:
        """One category closes the gate and another does not, after a few steps."""
        module = guard_class("gate").build(SHAPE, len(CATEGORIES), GUARDS["gate"])
        kv = random_kv((6, 6))
        forbid = torch.zeros(2, len(CATEGORIES), dtype=torch.bool)
        forbid[0, 0] = forbid[1, 1] = True
        mask, want = Mask(forbid, torch.zeros_like(forbid)), torch.tensor([[1.0], [0.0]])
        swapped = Mask(forbid.flip(0), mask.derive)

        def withheld(m: Mask) -> torch.Tensor:
            return module.rewrite(module.standardise(kv), kv.valid, m).withheld

        before = withheld(mask).detach()
        assert float((before[0] - before[1]).abs().max()) < 0.2
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(40):
            loss = (withheld(mask) - want).square().mean()
            loss = loss + (withheld(swapped) - want.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after, other = withheld(mask).detach(), withheld(swapped).detach()
        assert float(after[0].min()) > 0.9 > 0.1 > float(after[1].max())
        assert float(other[1].min()) > 0.9 > 0.1 > float(other[0].max())

    def test_a_codebook_without_words_is_refused(self) -> None:
        with pytest.raises(ValueError, match="words 0 must be at least 1"):
            guard_class("gate").build(SHAPE, len(CATEGORIES), {"words": 0})


def test_regress_approaches_its_target() -> None:
    module = guard_class("regress").build(
        SHAPE, len(CATEGORIES), {**GUARDS["regress"], "noise": 0.0}
    )
    raw, twin = random_kv((6, 6)), random_kv((6, 6), seed=1)
    target = module.standardise(twin)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    errors = []
    for _ in range(40):
        mean = module.rewrite(module.standardise(raw), raw.valid, forbid_all(2)).mean
        loss = (mean - target).square().mean()
        errors.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert errors[-1] < 0.2 * errors[0]
