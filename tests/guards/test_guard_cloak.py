"""The cloak: a bijection to those with the key, noise to the others, and no key where one looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.categories import CATEGORIES
from lcguard.guards.base import KVShape
from lcguard.guards.cloak import VARIABLE, CloakGuard
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import KVBatch
from tests.fixtures import forbid_all, random_kv

SHAPE = KVShape(2, 2, 8)
KEY, OTHER = "5a" * 32, "5b" * 32
LENGTHS = (5, 16, 2)


def cloak(key: str = KEY, block: int = 2, shape: KVShape = SHAPE, **more: Any) -> CloakGuard:
    options = {"key": key, "block": block, **more}
    return CloakGuard.build(shape, len(CATEGORIES), options)


def sent(module: CloakGuard, kv: KVBatch) -> KVBatch:
    return FrozenGuard(module)(kv, forbid_all(len(kv))).kv


@pytest.mark.parametrize("block", [0, 1, 2, 3, 50])
def test_the_receiver_with_the_key_has_the_raw_segment(block: int) -> None:
    module, kv = cloak(block=block), random_kv(LENGTHS)
    module.center.normal_()
    module.scale.uniform_(0.5, 2.0)
    out = sent(module, kv)
    back = module.unlock(out)
    torch.testing.assert_close(back.keys, kv.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back.values, kv.values, atol=1e-5, rtol=1e-4)
    assert torch.equal(back.valid, kv.valid)
    # on the wire nothing is where it was
    assert float((out.keys - kv.keys).abs().mean()) > 0.3
    assert not torch.equal(sent(cloak(OTHER, block), kv).keys, out.keys)
    wrong = cloak(OTHER, block).unlock(out)
    assert float((wrong.values - kv.values).abs().mean()) > 0.3


def test_blocks_change_places_whole() -> None:
    """Found by their length, which a rotation keeps; what is past the last whole block stays."""
    kv = random_kv((25,))
    module = cloak(block=4)
    before, after = (module.channels(k)[0].norm(dim=-1)[:, 0, 0] for k in (kv, sent(module, kv)))
    order = torch.cdist(after[:, None], before[:, None]).argmin(1)
    blocks = order[:24].view(6, 4)
    assert sorted(order.tolist()) == list(range(25))
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(4))
    assert blocks[:, 0].tolist() != sorted(blocks[:, 0].tolist())
    assert int(order[24]) == 24


def test_rotations_are_orthogonal_and_all_different() -> None:
    r = cloak().rotation.flatten(0, 1)
    torch.testing.assert_close(r @ r.mT, torch.eye(16).expand_as(r), atol=1e-5, rtol=0)
    assert float(torch.pdist(r.flatten(1)).min()) > 1


def test_the_key_is_nowhere(tmp_path: Path) -> None:
    module = cloak()
    guard = FrozenGuard(module)
    guard.save_pretrained(tmp_path / "cloak")
    raw = b"".join(f.read_bytes() for f in (tmp_path / "cloak").iterdir())
    shown = repr(module) + repr(module.config) + repr(guard.card) + repr(module.options())
    shown += repr(CloakGuard.Config(key=KEY))
    assert KEY not in shown
    assert "rotation" not in module.state_dict()
    for secret in (KEY.encode(), bytes.fromhex(KEY), module.rotation.numpy().tobytes()):
        assert secret not in raw
    assert str(module.options()["key_id"]).encode() in raw


def test_a_loaded_cloak_waits_for_its_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, kv = FrozenGuard(cloak()), random_kv(LENGTHS)
    guard.save_pretrained(tmp_path / "cloak")
    loaded = FrozenGuard.from_pretrained(tmp_path / "cloak")
    with pytest.raises(ValueError, match=f"has no key .*: set {VARIABLE} or call hold"):
        loaded(kv, forbid_all(3))
    assert isinstance(loaded.module, CloakGuard)
    with pytest.raises(ValueError, match="has no key"):
        loaded.module.unlock(kv)
    with pytest.raises(ValueError, match=r"this cloak needs key \w{16}, the one given is \w{16}"):
        loaded.module.hold(bytes.fromhex(OTHER))
    loaded.module.hold(bytes.fromhex(KEY))
    assert torch.equal(loaded(kv, forbid_all(3)).kv.keys, sent(cloak(), kv).keys)
    monkeypatch.setenv(VARIABLE, KEY)
    again = FrozenGuard.from_pretrained(tmp_path / "cloak")
    assert torch.equal(again(kv, forbid_all(3)).kv.keys, sent(cloak(), kv).keys)
    assert FrozenGuard(cloak()).digest == guard.digest != FrozenGuard(cloak(OTHER)).digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "5a" * 31}, "has 31 bytes, 32 are needed"),
        ({"key": "secret"}, "is not hexadecimal: give 32 bytes"),
        ({"block": -1}, "block -1 must be 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        cloak(**options)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


# -- the nano agent as receiver


@pytest.fixture(scope="module")
def agent() -> HFBackend:
    return load_backend("nano")


@pytest.mark.parametrize("block", [0, 8])
def test_the_agent_answers_after_unlock_and_not_before(agent: HFBackend, block: int) -> None:
    texts = [
        f"Employee record. The name is {name}. Job title: {title}\nSSN: {ssn}."
        for name, title, ssn in (
            ("Quella Brandt", "Analyst", "941-22-7310"),
            ("Tomas Ferro", "Manager", "912-45-8821"),
            ("Ines Okafor", "Technician", "933-18-2047"),
        )
    ]
    raw = agent.source.prefill([agent.encoder.context(t) for t in texts])
    module = cloak(block=block, shape=KVShape(*agent.source.shape))
    module.fit_statistics(raw)
    wire = sent(module, raw)

    def answers(kv: KVBatch) -> list[str]:
        prompts = [agent.encoder.prompt("What is the job title?")] * len(kv)
        found = agent.source.generate(kv, prompts, 12, agent.special.end_id)
        return [agent.decode(ids).strip() for ids in found]

    wanted = ["Analyst", "Manager", "Technician"]
    assert answers(module.unlock(wire)) == answers(raw) == wanted
    assert not set(answers(wire)) & set(wanted)
    eavesdropper = cloak(OTHER, block, KVShape(*agent.source.shape))
    eavesdropper.fit_statistics(raw)
    assert not set(answers(eavesdropper.unlock(wire))) & set(wanted)
