"""What a scan computed before its first mark: copied, brought to the second pass, and let go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from lcguard.manifest import Manifest, SegmentError
from lcguard.vllm import scanned_prefixes
from lcguard.vllm.pages import LayerPages
from lcguard.vllm.scanned_prefixes import KEPT_S, LEAST_TOKENS, PrefixCopies, ScannedPrefixes
from tests.vllm.test_rank_pages import BLOCK, BLOCKS, pages


def content(layers: list[LayerPages], slots: Tensor) -> Tensor:
    return torch.stack([torch.stack(layer.gather(slots)) for layer in layers])


def test_brings_the_tokens_that_were_asked_for_and_no_other() -> None:
    made = pages()
    copies, other = PrefixCopies(made), [0, 2]
    before = content(made.layers, made.slots(BLOCKS, 5, 35))
    assert copies.keep("scan", BLOCKS, 5, 35) == 30
    rest = content(made.layers, torch.arange(6 * BLOCK))
    # token 5 of the one is token 5 of the other, whose first 9 are there, and whose last is 31
    copies.place("scan", other, 5, 9, 31)
    brought = made.slots(other, 9, 31)
    assert torch.equal(content(made.layers, brought), before[:, :, 4:26])
    untouched = torch.ones(6 * BLOCK, dtype=torch.bool)
    untouched[brought] = False
    now = content(made.layers, torch.arange(6 * BLOCK))
    assert torch.equal(now[:, :, untouched], rest[:, :, untouched])
    copies.drop(["scan", "never was"])
    with pytest.raises(SegmentError, match="gone"):
        copies.place("scan", other, 5, 9, 31)


def test_keeps_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pages()
    each = sum(2 * x.heads * x.dim * 4 for x in made.layers)
    monkeypatch.setattr(scanned_prefixes, "KEPT_BYTES", 50 * each)
    copies = PrefixCopies(made)
    assert copies.keep("few", BLOCKS, 0, LEAST_TOKENS - 1) == 0
    assert copies.keep("first", BLOCKS, 0, 35) == 35
    assert copies.keep("second", BLOCKS, 0, 35) == 15
    assert copies.keep("third", BLOCKS, 0, 35) == 0
    copies.drop(["first"])
    assert copies.keep("third", BLOCKS, 0, 35) == 35
    made.world = 2  # another rank would not know of it
    assert PrefixCopies(made).keep("fourth", BLOCKS, 0, 35) == 0


def test_a_word_is_good_once_and_for_a_while() -> None:
    now = [100.0]
    prefixes = ScannedPrefixes(clock=lambda: now[0])
    prefixes.offer("word", (), "a", 20)
    assert prefixes.claim("another word", ()) is None
    assert prefixes.claim("word", ()) == ("a", 20)
    assert prefixes.claim("word", ()) is None
    assert prefixes.to_drop() == []  # its request has not ended
    prefixes.release("a")
    assert prefixes.to_drop() == ["a"]
    assert prefixes.to_drop() == []
    prefixes.offer("same", (), "b", 20)
    prefixes.offer("same", (), "c", 20)  # the same prompt within a second
    assert prefixes.to_drop() == ["b"]
    now[0] += KEPT_S
    assert prefixes.to_drop() == ["c"]
    assert prefixes.claim("same", ()) is None


def test_a_word_is_good_behind_the_same_segments_alone() -> None:
    """Tokens read behind one segment would carry what is in it past the lineage of another."""
    one, two = (cast(Manifest, SimpleNamespace(handle=name)) for name in "ab")
    prefixes = ScannedPrefixes()
    prefixes.offer("word", [one], "scan", 20)
    for others in ([], [two], [one, two], [two, one], [one, one]):
        assert prefixes.claim("word", others) is None
    assert prefixes.claim("word", [one]) == ("scan", 20)
