"""The noise of a hop: the cipher's own stream, an exact law, the same however a segment comes."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from lcguard.discrete_gaussian import (
    BITS,
    SLOTS,
    STEPS,
    TOTAL,
    ZERO,
    discrete_gaussian,
    table,
    weights,
)
from lcguard.noise import key_stream, new_noise_key, noise_key, segment_noise
from tests.fixtures import forbid_all, random_kv
from tests.guards.every_guard import guard_of

SHAPE = (3, 2, 24)
VALUES = range(-ZERO, ZERO)


def test_the_stream_is_chacha20_of_the_standard() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2: a key of zeros, blocks 0 and 1
    zeros = key_stream(bytes(32), 0, 2)
    assert zeros[0].tobytes().hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")
    assert zeros[1].tobytes().hex().startswith("9f07e7be5551387a98ba977c732d080d")


# -- the law


def test_the_table_gives_every_value_its_weight() -> None:
    """Slot by slot, in integers: what the alias method draws is what the weights say."""
    own = TOTAL // SLOTS
    given = [0] * SLOTS
    for slot, entry in enumerate(table().tolist()):
        threshold, alias = entry % (1 << BITS), entry >> BITS
        given[slot] += threshold
        given[alias] += own - threshold
    assert tuple(given) == weights()
    assert sum(weights()) == TOTAL
    # of the format: an engine and a reader of another processor or release have the same
    digest = hashlib.sha256(table().astype("<u8").tobytes()).hexdigest()
    assert digest == "e072059d64b56f0e3bd5107f46c38bcf5e7fb9568075523898ab8b856bbf3b70"


def test_the_law_is_the_discrete_gaussian() -> None:
    """Mean 0 exactly, and a statistical distance below 2^-51 from exp(-n^2 / 2 S^2), each weight
    beside an exponential of its own."""
    law = weights()
    assert law[1:ZERO] == law[:ZERO:-1]
    assert law[0] == 0
    variance = Fraction(sum(w * n * n for w, n in zip(law, VALUES, strict=True)), TOTAL)
    assert abs(variance - STEPS**2) < 1e-9
    with localcontext() as context:
        context.prec = 50
        ideal = [(Decimal(-n * n) / (2 * STEPS**2)).exp() for n in range(ZERO)]
        # what lies beyond the table, 16 standard deviations, is below 2^-180
        total = 2 * sum(ideal, Decimal(0)) - 1
        off = [abs(law[ZERO + n] / Decimal(TOTAL) - p / total) for n, p in enumerate(ideal)]
        distance = sum(off[1:], off[0] / 2)
        assert distance < Decimal(2) ** -51


@pytest.mark.parametrize("steps", [1, 7, 300, STEPS, 3 * STEPS])
def test_a_mean_so_many_steps_away_costs_the_certificates_nats(steps: int) -> None:
    """From the table's own weights, for the law as it is drawn: exp(-n^2 / 2 S^2) but for values
    of which one draw in ten million is."""
    law = np.array([w / TOTAL for w in weights()])
    here, there = law[steps:], law[:-steps]
    both = (here > 2.0**-55) & (there > 2.0**-55)  # below, a weight has few bits left
    nats = float((here[both] * np.log(here[both] / there[both])).sum())
    assert nats == pytest.approx(steps**2 / (2 * STEPS**2), rel=1e-5)


def test_words_become_draws_by_the_table_alone() -> None:
    """One draw at a time in Python's integers, extreme words among them."""
    words = np.concatenate(
        (
            np.repeat(np.array([[0], [2**32 - 1], [1 << 31]], dtype=np.uint32), 16, 1),
            key_stream(noise_key(0, "words"), 7, 200),
        )
    )
    wanted = []
    for low, high in words.reshape(-1, 2).tolist():
        word = high << 32 | low
        slot, rest = word >> BITS, word % (1 << BITS)
        entry = int(table()[slot])
        wanted.append((slot if rest < entry % (1 << BITS) else entry >> BITS) - ZERO)
    assert discrete_gaussian(words).flatten().tolist() == wanted


def test_a_word_next_to_its_threshold_is_decided_by_all_its_bits() -> None:
    """Most words are told from it by 32 bits; those that are not are one in four billion."""
    slots = [1, 5, 9000, ZERO, 20000, SLOTS - 1]
    wanted, pairs = [], []
    for slot in slots:
        entry = int(table()[slot])
        threshold, alias = entry % (1 << BITS), entry >> BITS
        for rest in (threshold - 1, threshold, threshold + 1, threshold ^ 1, threshold ^ (1 << 16)):
            if 0 <= rest < 1 << BITS:
                word = slot << BITS | rest
                pairs.append([word % (1 << 32), word >> 32])
                wanted.append((slot if rest < threshold else alias) - ZERO)
    words = np.array(pairs, dtype=np.uint32)
    assert discrete_gaussian(words)[:, 0].tolist() == wanted
    assert len({*wanted}) > len(slots)


def test_draws_are_normal_and_independent() -> None:
    noise = segment_noise(noise_key(0, "a"), SHAPE, 4000)
    flat = noise.double().flatten() / STEPS
    n = len(flat)
    assert abs(float(flat.mean())) < 5 / math.sqrt(n)
    assert abs(float(flat.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((flat**4).mean()) - 3) < 0.05
    for shift in (1, 2, 24):
        assert abs(float((flat[:-shift] * flat[shift:]).mean())) < 5 / math.sqrt(n)
    assert float((flat.abs() > 1.959964).double().mean()) == pytest.approx(0.05, abs=0.003)


# -- where it lies


def test_a_part_of_a_segment_has_the_noise_of_its_place() -> None:
    key = new_noise_key()
    whole = segment_noise(key, SHAPE, 1300)
    assert torch.equal(segment_noise(key, SHAPE, 40, first_token=1020), whole[1020:1060])
    assert not torch.equal(segment_noise(new_noise_key(), SHAPE, 4), whole[:4])


def test_batch_and_padding_do_not_change_the_noise() -> None:
    """Or the same record would get other noise beside other neighbours: two draws to average."""
    guard = guard_of("gaussian")
    keys = [noise_key(1, str(i)) for i in range(3)]
    kv = random_kv((9, 4, 6))
    together = guard(kv, forbid_all(3), keys=keys).kv
    alone = guard(kv[1:2].trim(), forbid_all(1), keys=keys[1:2]).kv
    torch.testing.assert_close(alone.keys, together[1:2].trim().keys)


def test_without_keys_the_noise_is_secret_and_new_each_time() -> None:
    guard, kv = guard_of("gaussian"), random_kv((5,))
    first, second = (guard(kv, forbid_all(1)).kv for _ in range(2))
    assert not torch.equal(first.keys, second.keys)
    third, fourth = (guard.module(kv, forbid_all(1))[0] for _ in range(2))
    assert not torch.equal(third.keys, fourth.keys)


@pytest.mark.parametrize(
    ("key", "first", "message"),
    [(b"short", 0, "5 bytes"), (bytes(32), 2**32, "exceed 2\\^32"), (bytes(32), -1, "exceed")],
)
def test_bad_requests_are_refused(key: bytes, first: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        key_stream(key, first, 1)


def test_a_key_for_every_segment() -> None:
    with pytest.raises(ValueError, match="1 noise keys for 2 segments"):
        guard_of("gaussian")(random_kv((3, 3)), forbid_all(2), keys=[bytes(32)])
