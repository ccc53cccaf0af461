"""What a publish reads of the pages, some tokens at a time, and the digest that names its noise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.noise import noise_key
from lcguard.vllm.pages import LayerPages
from lcguard.vllm.rank_pages import PageTokens, RankPages
from lcguard.vllm.rewrite import arithmetic, by_pages
from tests.fixtures import forbid_all
from tests.ops.triton_cases import LAYERS, Case, module_of, rotary_of
from tests.vllm.cpu_pages import Writer

HEADS, DIM, BLOCK, TOKENS, START = 2, 16, 16, 40, 23
BLOCKS = [4, 1, 3, 5]
"""Of the request, in order."""
ROTARY = rotary_of(DIM)


def pages(dtype: torch.dtype = torch.float32) -> RankPages:
    generator = torch.Generator().manual_seed(3)
    layers = [
        LayerPages(
            f"layer {i}",
            SimpleNamespace(isa="vec", impl=Writer()),
            torch.randn(6, HEADS, BLOCK, 2 * DIM, generator=generator).to(dtype),
        )
        for i in range(LAYERS)
    ]
    return RankPages(ROTARY, BLOCK, layers=layers)


def tokens_of(made: RankPages) -> PageTokens:
    return made.tokens(BLOCKS, START, START + TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_is_read_at_once(dtype: torch.dtype) -> None:
    made = pages(dtype)
    keys, values = made.read(BLOCKS, START, START + TOKENS)
    tokens = tokens_of(made)
    assert tokens.n_tokens == TOKENS
    for start, end in ((0, TOKENS), (5, 6), (17, 33)):
        kv = tokens.read(start, end)
        assert kv.keys.dtype == kv.values.dtype == torch.float32
        assert torch.equal(kv.values[0].to(dtype), values[:, :, start:end])
        # rounded after it was turned; here it is turned exactly
        off = (kv.keys[0] - keys[:, :, start:end].float()).abs().max()
        assert float(off) < (1e-5 if dtype == torch.float32 else 2.0**-6)


def test_the_digest_is_of_the_content_and_not_of_how_it_was_read() -> None:
    made, found = pages(), set()
    for reads in (
        [],
        [(0, TOKENS)],
        [(i, i + 1) for i in range(TOKENS)],
        [(0, 1), (0, 7), (3, 40)],
    ):
        tokens = tokens_of(made)
        for start, end in reads:
            tokens.read(start, end)
        found.add(tokens.digest())
        tokens.read(2, 9)  # again: it is in already
        found.add(tokens.digest())
    assert len(found) == 1
    # another place, another bit
    found.add(made.tokens(BLOCKS, START - 1, START - 1 + TOKENS).digest())
    found.add(made.tokens(BLOCKS, START, START + TOKENS - 1).digest())
    made.layers[1].values[3, 1, 2, 5] += 1e-6
    found.add(tokens_of(made).digest())
    assert len(found) == 4


def test_some_layers_are_read_as_all_are_and_not_digested() -> None:
    made = pages()
    tokens, whole = tokens_of(made), tokens_of(made).read(3, 40)
    for layers in ([1], [1, 0]):
        kv = tokens.read(3, 40, layers)
        assert torch.equal(kv.keys, whole.keys[:, layers])
        assert torch.equal(kv.values, whole.values[:, layers])
    wanted = tokens_of(made).digest()
    assert tokens.digest() == wanted
    undigested = made.tokens(BLOCKS, START, START + TOKENS, digested=False)
    undigested.read(0, TOKENS)
    assert undigested.digest() == wanted


@pytest.mark.parametrize("name", ["gate", "gaussian"])
def test_another_arithmetic_has_another_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and tiles round in other places: under one noise the difference would show."""
    made, guard = pages(), FrozenGuard(module_of(Case(name, dim=DIM, heads=HEADS, noise=0.3)))
    monkeypatch.delenv("LCGUARD_OPS", raising=False)
    assert not by_pages(guard, made.layers)
    tiles = arithmetic(guard, made.layers)
    monkeypatch.setenv("LCGUARD_OPS", "reference")
    assert by_pages(guard, made.layers)
    assert arithmetic(guard, made.layers) != tiles


def test_a_passage_from_pages_is_the_guard_on_gathered_kv() -> None:
    made, key = pages(), noise_key(2, "segment")
    guard = FrozenGuard(module_of(Case("gate", dim=DIM, heads=HEADS, noise=0.3)))
    tokens, mask = tokens_of(made), forbid_all(1)
    kv = guard.passage(tokens, mask).block(key, 0, TOKENS)
    wanted = guard(tokens.read(0, TOKENS), mask, keys=[key]).kv
    apart = [guard.module.grid_points(x, mask) for x in (kv, wanted)]
    assert float((apart[0] - apart[1]).abs().max()) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [BLOCKS, [1, 2, 3, 4], [5, 4, 2, 0]])
def test_a_copy_has_the_bits_of_what_is_read(dtype: torch.dtype, blocks: list[int]) -> None:
    made = pages(dtype)
    tokens = made.tokens(blocks, START, START + TOKENS)
    size = (LAYERS, HEADS, TOKENS, DIM)
    keys, values = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    tokens.copy(keys, values)
    read = tokens.read(0, TOKENS).to(dtype)
    assert torch.equal(keys, read.keys[0])
    assert torch.equal(values, read.values[0])


def test_what_is_sent_as_it_is_is_withheld_where_it_is_not_finite() -> None:
    made = pages()
    guard = FrozenGuard(module_of(Case("identity", dim=DIM, heads=HEADS)))
    passage = guard.passage(tokens_of(made), forbid_all(1))
    size = (LAYERS, HEADS, TOKENS, DIM)
    keys, values = torch.empty(size), torch.empty(size)
    passage.fill(noise_key(2, "segment"), keys, values)
    assert torch.equal(keys, tokens_of(made).read(0, TOKENS).keys[0])
    made.layers[1].values[3, 1, 2, 5] = torch.nan
    with pytest.raises(GuardError, match="not finite"):
        passage.fill(noise_key(2, "segment"), keys, values)
