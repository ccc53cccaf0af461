"""Equal content gets equal noise, another bit of raw KV gets another; what grows is one draw."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lcguard.grid import noisy
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.handoff.content import Chain, Content, chain_of, content_of
from lcguard.manifest import Manifest
from lcguard.noise import segment_noise
from lcguard.protocols import KVBatch
from lcguard.segment import KVSegment
from lcguard.store import open_store
from lcguard.vllm.draws import Draws, Rows
from lcguard.vllm.rank_pages import GatheredTokens

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
LAYERS, HEADS, DIM = 2, 2, 8
CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    head_dim=DIM,
    vocab_size=64,
)
EDGE, MODEL, GUARD = ("a", "b", ["health"], []), ("r" * 64, "c" * 64), "f" * 64


def content(
    tokens: Any = range(5), edge: Any = EDGE, model: Any = MODEL, on: Any = (), key: bytes = KEY
) -> Content:
    return content_of(key, edge, model, on, list(tokens))


def digest(keys: torch.Tensor, values: torch.Tensor) -> str:
    """Of raw KV ``[L, H, T, D]``, as a worker of several ranks has it."""
    valid = torch.ones(1, keys.shape[2], dtype=torch.bool)
    return GatheredTokens(KVBatch(keys[None], values[None], valid)).digest()


class Engine:
    """Draws as an engine makes them; ``jitter`` is what its arithmetic adds to the raw KV."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 0.0
        self.store = open_store(str(folder / "store"), clock=lambda: self.now_s)
        self.draws, self.n = Draws(KEY, self.store), 0

    def raw(self, tokens: list[int], jitter: float = 0.0) -> torch.Tensor:
        """``[L, H, T, D]``; a row depends on all tokens up to its own."""
        rows = []
        for i in range(len(tokens)):
            seed = hash(tuple(tokens[: i + 1])) % 2**31
            generator = torch.Generator().manual_seed(seed)
            rows.append(torch.randn(LAYERS, HEADS, 1, DIM, generator=generator))
        return torch.cat(rows, 2) + jitter

    def publish(self, tokens: list[int], jitter: float = 0.0, whole: bool = False) -> KVSegment:
        raw = self.raw(tokens, jitter)
        chain = chain_of(content(tokens), GUARD)
        key = self.draws.noise_key(chain, digest(raw, raw))
        made = self.guarded(raw, key)
        rows = self.draws.settle(chain, key, made, made.clone(), whole)
        self.n += 1
        handle = f"{self.n:032d}"
        segment = KVSegment.create(
            rows.keys,
            rows.values,
            CONFIG,
            model_id="m",
            draw=rows.draw,
            handle=handle,
            audience="b",
            guard_digest=GUARD,
            expires_at_s=1000,
        ).sign(KEY)
        self.store.put(segment)
        self.draws.stored(chain, rows, [handle])
        return self.store.load(handle, KEY)

    @staticmethod
    def guarded(raw: torch.Tensor, key: bytes) -> torch.Tensor:
        """Everything passes with noise."""
        mean = raw.permute(2, 0, 1, 3).flatten(2)[:, :, None]  # [T, L, 1, H * D]
        noise = segment_noise(key, (LAYERS, HEADS, DIM), raw.shape[2])[:, :, :1]
        z = noisy(mean, 0.5, noise)
        return z[:, :, 0].unflatten(2, (HEADS, DIM)).permute(1, 2, 0, 3).contiguous()


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


def equal(a: KVSegment, b: KVSegment) -> int:
    """First rows in common."""
    n = min(a.keys.shape[2], b.keys.shape[2])
    same = [torch.equal(a.keys[:, :, i], b.keys[:, :, i]) for i in range(n)]
    return same.index(False) if False in same else n


TEXT = list(range(100, 137))
"""37 tokens: two blocks and a rest."""


@pytest.mark.parametrize("jitter", [0.0, 1e-6])
def test_equal_content_gives_equal_bytes(engine: Engine, jitter: float) -> None:
    first, again = engine.publish(TEXT), engine.publish(TEXT, jitter)
    assert equal(first, again) == len(TEXT)
    assert first.manifest.tensor_digests == again.manifest.tensor_digests
    assert first.manifest.draw == again.manifest.draw != ""


def test_a_conversation_that_grows_is_one_draw(engine: Engine) -> None:
    # now and then a turn is published again
    turns = [engine.publish(TEXT + list(range(500, 500 + n))) for n in (0, 0, 4, 30, 30, 31)]
    for before, after in pairwise(turns):
        assert equal(before, after) == before.keys.shape[2]
    assert len({t.manifest.draw for t in turns}) == 1
    # what one had before is no news, though it is not the longest
    assert engine.publish(TEXT).manifest.draw == turns[0].manifest.draw


def test_a_branch_is_another_draw_with_the_stem_as_it_was(engine: Engine) -> None:
    stem = engine.publish(TEXT)
    one, two = engine.publish([*TEXT, 1, 2, 3]), engine.publish([*TEXT, 7, 8, 9])
    assert equal(stem, one) == equal(stem, two) == equal(one, two) == len(TEXT)
    assert one.manifest.draw == stem.manifest.draw != two.manifest.draw
    # cut off within a block, the blocks before it are as they were
    changed = engine.publish([*TEXT[:35], 1, 1])
    assert equal(stem, changed) == 32
    assert changed.manifest.draw not in {stem.manifest.draw, two.manifest.draw}


def test_of_two_that_grow_at_the_same_time_one_is_another_draw(engine: Engine) -> None:
    stem = engine.publish(TEXT)
    made = []
    for tokens in ([*TEXT, 1, 2, 3], [*TEXT, 7, 8, 9]):  # settled before either is stored
        raw, chain = engine.raw(tokens), chain_of(content(tokens), GUARD)
        key = engine.draws.noise_key(chain, digest(raw, raw))
        made.append(engine.draws.settle(chain, key, engine.guarded(raw, key), raw).draw)
    assert made[0] == stem.manifest.draw != made[1]


def test_one_more_token_at_the_start_is_another_draw(engine: Engine) -> None:
    first, moved = engine.publish(TEXT), engine.publish([9, *TEXT])
    assert equal(first, moved) == 0
    assert first.manifest.draw != moved.manifest.draw


def test_what_is_gone_is_drawn_again_and_counts(engine: Engine) -> None:
    """Same bits, same noise; other bits, other noise everywhere, and another name."""
    first = engine.publish(TEXT)
    engine.now_s = 2000.0
    engine.store.sweep()
    engine.now_s = 0.0
    assert engine.store.handles() == []
    jittered = engine.publish(TEXT, 1e-6)
    assert equal(first, jittered) == 0
    share = (first.keys == jittered.keys).float().mean()
    assert share < 0.01, "one noise under two means shows where they lie between grid points"
    assert jittered.manifest.draw != first.manifest.draw
    # an engine that remembers nothing: from the same bits the same bytes
    other = Engine(Path(str(engine.store._root) + "-other"))  # type: ignore[attr-defined]
    repeated = other.publish(TEXT)
    assert equal(first, repeated) == len(TEXT)
    assert repeated.manifest.draw == first.manifest.draw


def test_a_guard_that_moves_tokens_takes_over_all_or_nothing(engine: Engine) -> None:
    first = engine.publish(TEXT, whole=True)
    assert equal(first, engine.publish(TEXT, 1e-6, whole=True)) == len(TEXT)
    longer = engine.publish([*TEXT, 5], 1e-6, whole=True)
    assert equal(first, longer) == 0
    assert longer.manifest.draw != first.manifest.draw


def test_everything_is_in_the_key(engine: Engine) -> None:
    raw = engine.raw(TEXT)
    below = engine.publish([1, 2, 3]).manifest

    def key(
        guard: str = GUARD, keys: torch.Tensor = raw, values: torch.Tensor = raw, **changes: Any
    ) -> bytes:
        draws = Draws(changes.get("key", KEY), engine.store)
        chain = chain_of(content(**{"tokens": TEXT} | changes), guard)
        return draws.noise_key(chain, digest(keys, values))

    bit = raw.clone()
    bit.view(torch.int32)[0, 0, 3, 1] ^= 1
    changes: dict[str, Callable[[], bytes]] = {
        "source": lambda: key(edge=("x", *EDGE[1:])),
        "audience": lambda: key(edge=("a", "x", *EDGE[2:])),
        "forbid": lambda: key(edge=(*EDGE[:2], ["health", "person"], [])),
        "derive": lambda: key(edge=(*EDGE[:3], ["health"])),
        "weights": lambda: key(model=("q" * 64, MODEL[1])),
        "guard": lambda: key(guard="e" * 64),
        "tokens": lambda: key(tokens=[*TEXT[:-1], 5]),
        "on top of": lambda: key(on=[below]),
        "deployment": lambda: key(key=OTHER_KEY),
        "a bit of a key": lambda: key(keys=bit),
        "a bit of a value": lambda: key(values=bit),
    }
    made = {name: change() for name, change in changes.items()}
    assert key() == key()
    assert len({key(), *made.values()}) == len(made) + 1, "two of them share their noise"
    assert all(len(k) == 32 for k in made.values())


def test_names_tell_nothing_to_who_lacks_the_key(engine: Engine) -> None:
    """The name of a draw and a manifest cannot be made from a guess of the text."""
    shown = engine.publish(TEXT).manifest
    chain = chain_of(content(TEXT, key=OTHER_KEY), GUARD)
    guessed = Draws(OTHER_KEY, engine.store)
    raw = engine.raw(TEXT)
    rows = guessed.settle(chain, guessed.noise_key(chain, digest(raw, raw)), raw, raw)
    assert rows.draw != shown.draw
    assert isinstance(shown, Manifest)


@pytest.mark.parametrize(
    ("name", "options", "forbids", "noisy_"),
    [
        ("identity", {}, True, False),
        ("redact", {}, True, False),
        ("gaussian", {"noise": 0.5}, False, True),
        ("gate", {"noise": 0.5}, True, True),
        ("gate", {"noise": 0.5}, False, False),
        (
            "compose",
            {"parts": [{"guard": "identity"}, {"guard": "gaussian", "options": {"noise": 0.1}}]},
            True,
            True,
        ),
    ],
)
def test_which_guards_draw(name: str, options: Any, forbids: bool, noisy_: bool) -> None:
    made = guard_class(name).build(KVShape(2, 2, 8), 7, options)
    assert FrozenGuard(made).is_noisy(forbids) is noisy_


def test_a_chain_names_each_start(engine: Engine) -> None:
    def chain(tokens: list[int]) -> Chain:
        return chain_of(content(tokens), GUARD)

    assert chain(TEXT)[:20] == chain(TEXT[:20])
    assert len(set(chain([1, 1, 1]) + chain([1, 2]))) == 4
    assert Rows(engine.raw([1]), engine.raw([1])).draw == ""
