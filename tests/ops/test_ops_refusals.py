"""What the operations on pages refuse, and which implementation is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lcguard import ops
from lcguard.ops import dispatch, reference
from lcguard.ops.stream import NoiseStream
from lcguard.ops.work import Bottleneck, Gate, TokenWork, work_of
from tests.fixtures import random_kv
from tests.guards.every_guard import module_of as guard_module
from tests.ops.test_ops_reference import (
    DIM,
    HEADS,
    KEY,
    MASKS,
    ROTARY,
    SLOTS,
    START,
    TOKENS,
    decision_of,
    guarded,
    module_for,
    placed,
)
from tests.ops.triton_cases import LAYERS, rotary_of


def test_work_that_cannot_be_done_is_refused() -> None:
    cases = [
        ("gaussian", {}, "noise 0.7 needs a key"),
        ("residual", {"heads": 1}, "'residual' mixes heads: a shard of 1 of 2"),
        ("residual", {"layer": 2}, "layer 2 is not one of 2"),
        ("identity", {"first_head": 1, "heads": 2}, "heads 1..3 are not of 2"),
        ("gate", {"noise_key": KEY}, "give decision=decide"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            work_of(module_for(name), **{"layer": 0, **options})
    module, kv = module_for("gate"), random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    decision = decision_of(module, kv, MASKS["all"])
    with pytest.raises(ValueError, match="'gate' mixes heads"):
        work_of(module, 0, noise_key=KEY, heads=1, decision=decision)
    for name in ("regress", "redact"):
        with pytest.raises(ValueError, match=f"'{name}' has no per-token form; these have: gate,"):
            work_of(guard_module(name), 0)


def test_tensors_of_another_size_are_refused() -> None:
    w, t = torch.zeros(2, 4), torch.zeros(3, 2)
    gate = Gate(t, t, torch.zeros(2, 2, 4))
    net = Bottleneck(w, w, torch.zeros(2, 4, 3), torch.zeros(2, 3), torch.zeros(2, 3, 4), w)
    refused = [
        ("scale is torch.float32 \\(2, 3\\)", lambda: TokenWork(w, w[:, :3])),
        ("center is torch.float64", lambda: TokenWork(w.double(), w)),
        ("codebook is", lambda: TokenWork(w[:, :3], w[:, :3], gate=gate)),
        ("gain is", lambda: TokenWork(w[:, :3], w[:, :3], net)),
        ("one guard has one", lambda: TokenWork(w, w, net, gate)),
        ("closed is", lambda: replace(gate, words=t[:2])),
        ("words is", lambda: replace(gate, words=torch.zeros(3, 4))),
        ("give both or none", lambda: replace(gate, squeeze=torch.zeros(2, 4, 4))),
        ("expand is", lambda: replace(gate, squeeze=torch.zeros(2, 4, 4), expand=w)),
        ("up is", lambda: replace(net, up=torch.zeros(2, 4, 4))),
    ]
    for message, make in refused:
        with pytest.raises(ValueError, match=message):
            make()


def test_pages_that_do_not_fit_are_refused() -> None:
    kv = random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    keys, values = placed(kv)[0]
    out = torch.empty(2, HEADS, TOKENS, DIM)
    work = work_of(module_for("identity"), 0)
    fitting = {
        "k_view": keys,
        "v_view": values,
        "slots": SLOTS,
        "rotary": ROTARY,
        "start": 0,
        "work": work,
        "out_keys": out[0],
        "out_values": out[1],
    }
    shard = work_of(module_for("identity"), 0, heads=1)
    late = replace(work, stream=NoiseStream(KEY, 0, LAYERS, HEADS, first_head=1))
    gate = Gate(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, 2, HEADS * DIM))
    for changes, message in (
        ({"v_view": values[:, :1]}, "give two views"),
        ({"slots": SLOTS.int()}, "slots are torch.int32"),
        ({"slots": SLOTS + 1}, "slot 15 is past the last of 15"),
        ({"rotary": rotary_of(32)}, "this rotation D=32"),
        ({"out_keys": out[0, :1]}, "are not \\(2, 7, 16\\)"),
        ({"out_values": out[1].double()}, "float64 is not supported"),
        ({"out_values": out[1].to("meta")}, "are on .*: use one device"),
        ({"work": shard}, "the work is for W=16"),
        ({"work": late}, "2 heads from 1 on are not of 2"),
        ({"work": replace(work, gate=gate)}, "decided on 3 tokens of 7"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.rewrite_layer(**{**fitting, **changes})


def test_the_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 2)
    assert dispatch.choose(x) == "reference"
    monkeypatch.setenv("LCGUARD_OPS", "reference")
    assert dispatch.choose(x) == "reference"
    monkeypatch.setenv("LCGUARD_OPS", "cuda")
    with pytest.raises(ValueError, match="'cuda' is neither 'reference' nor 'triton'"):
        dispatch.choose(x)
    monkeypatch.setenv("LCGUARD_OPS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match="needs CUDA tensors, these are on cpu"):
        dispatch.choose(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose(x) == "triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        dispatch.choose(x)


def test_what_no_kernel_does_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        calls = 0

        @classmethod
        def rewrite_layer(cls, *args: object) -> None:
            cls.calls += 1
            raise NotImplementedError("D=512 exceeds 256")

        place_layer = rewrite_layer

    monkeypatch.setattr(ops, "kv_rewrite", Kernels, raising=False)
    monkeypatch.setattr(dispatch, "choose", lambda *paged: "triton")
    kv = random_kv((TOKENS,), (LAYERS, HEADS, DIM))
    found = guarded(module_for("identity"), kv, MASKS["all"])
    assert Kernels.calls == LAYERS
    assert torch.equal(found[1], kv.values[0])
    keys, values = placed(kv)[0]
    fresh = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
    dispatch.place_layer(kv.keys[0, 0], kv.values[0, 0], SLOTS, ROTARY, START, *fresh)
    assert torch.equal(fresh[0].nan_to_num(), keys.nan_to_num())
    monkeypatch.setenv("LCGUARD_OPS", "triton")
    with pytest.raises(NotImplementedError, match="D=512"):
        guarded(module_for("identity"), kv, MASKS["all"])
