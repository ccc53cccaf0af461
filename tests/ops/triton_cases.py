"""Kernel against reference, case by case: ``python -m tests.ops.triton_cases`` prints JSON.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter needs a process of its own;
with a GPU the same cases run in the test's process. Pages that no slot names hold NaN and output
starts as NaN: what is read or left unwritten by mistake shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.discrete_gaussian import STEPS
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.gate import GateGuard
from lcguard.noise import noise_key
from lcguard.ops import reference
from lcguard.ops.work import TokenWork, decide, work_of
from lcguard.protocols import Mask
from lcguard.rope import Rotary

LAYOUTS = {"LBNHC": (0, 2, 1, 3), "LBHNC": (0, 1, 2, 3), "BHNLC": (0, 1, 2, 3)}
"""Physical order of the pages: permutation to [B, H, N, C]."""
LAYERS = 2


@dataclass(frozen=True)
class Case:
    guard: str = "identity"
    dim: int = 32
    heads: int = 2
    tokens: int = 5
    page: int = 3
    """Rows of a block."""
    dtype: str = "float32"
    layout: str = "LBNHC"
    noise: float = 0.0
    rotated: float = 1.0
    """Share of D."""
    shard: tuple[int, int] | None = None
    """First head and number of heads."""
    start: int = 1000
    derive: bool = False
    squeeze: bool = True
    bottleneck: int = 5
    long: bool = False
    """Launched as a segment that fills the device: larger tiles, all heads in one program."""


CASES: dict[str, Case] = {
    "plain": Case(),
    "plain_bf16_heads_first": Case(dtype="bfloat16", layout="LBHNC", dim=64, tokens=3),
    "plain_fp16_one_token": Case(dtype="float16", tokens=1, dim=128, heads=1),
    "plain_many_tiles": Case(tokens=67, page=16, dim=32),
    "plain_far": Case(start=131000, dim=128, heads=1),
    "partial_rotary": Case(dim=80, rotated=0.4),
    "gaussian": Case("gaussian", noise=0.5),
    "gaussian_odd_dim": Case("gaussian", noise=0.5, dim=40, heads=1, layout="BHNLC"),
    "gaussian_bf16_shard": Case("gaussian", dtype="bfloat16", noise=0.5, heads=4, shard=(2, 1)),
    "residual": Case("residual", tokens=7),
    "residual_noise_80": Case("residual", dim=80, heads=1, noise=0.2, bottleneck=17),
    "residual_three_heads_fp16": Case("residual", dim=40, heads=3, dtype="float16", tokens=3),
    "gate": Case("gate", noise=0.3, derive=True),
    "gate_odd": Case("gate", noise=0.3, dim=40, heads=1, layout="LBHNC", tokens=17),
    "gate_bf16": Case("gate", dtype="bfloat16", dim=64, heads=1),
    "long_gaussian": Case("gaussian", noise=0.5, heads=3, long=True),
    "long_residual_bf16": Case("residual", dtype="bfloat16", tokens=18, long=True),
    "long_gate_fp16": Case("gate", dtype="float16", tokens=17, noise=0.2, long=True),
    "gate_shard": Case("gate", heads=3, shard=(1, 2), squeeze=False, derive=True),
}
TOLERANCE = {"float32": 2e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Difference over max(1, value): rounding once, in another place."""
MOVED = 0.01
"""Share of grid points that may lie one step apart: a mean near a tie, rounded in another place."""


@dataclass(frozen=True)
class Off:
    """How far the kernels are from the reference."""

    rewritten: float
    """Largest difference where no grid point differs."""
    placed: float
    steps: float = 0.0
    """Largest distance of two grid points, of noisy float32 output."""
    moved: float = 0.0
    """Share of grid points that differ."""


def rotary_of(dim: int, share: float = 1.0, scaling: float = 1.3) -> Rotary:
    half = int(dim * share) // 2
    freq = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    return Rotary("default", dim, tuple(freq.tolist()), scaling)


def pages_of(
    layout: str, blocks: int, heads: int, page: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """NaN pages: K and V views ``[B, H, N, D]`` of one layer of a buffer in that order."""
    size = {"L": LAYERS, "B": blocks, "H": heads, "N": page, "C": 2 * dim}
    buffer = torch.full([size[x] for x in layout], torch.nan, dtype=dtype, device=device)
    order = layout.replace("L", "")
    view = buffer.select(layout.index("L"), 1).permute([order.index(x) for x in "BHNC"])
    return view[..., :dim], view[..., dim:]


def module_of(case: Case) -> GuardModule:
    options = {
        "residual": {"bottleneck": case.bottleneck},
        "gate": {"width": 32, "blocks": 1, "words": 3},
    }.get(case.guard, {})
    module = guard_class(case.guard).build(
        KVShape(LAYERS, case.heads, case.dim), len(CATEGORIES), {**options, "noise": case.noise}
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*module.parameters(), module.center):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        module.scale.copy_(0.5 + torch.rand(module.scale.shape, generator=generator))
        if isinstance(module, GateGuard):
            module.gate.bias.sub_(1.5)  # gates of all sizes
            eye = torch.eye(module.squeeze.shape[-1])
            for matrix in (module.squeeze, module.expand):
                matrix.mul_(0.3 if case.squeeze else 0.0).add_(eye)
    return module.eval()


def work_for(case: Case, device: str, key: bytes = noise_key(3, "case")) -> TokenWork:
    module, decision = module_of(case).to(device), None
    if isinstance(module, GateGuard):
        z = torch.randn(case.tokens, LAYERS, 2, case.heads * case.dim).to(device)
        forbid = torch.arange(len(CATEGORIES))[None] % 2 == 0
        decision = decide(module, z, Mask(forbid, forbid & case.derive))
    first, heads = case.shard or (0, case.heads)
    return work_of(
        module,
        1,
        noise_key=key,
        first_token=11,
        first_head=first,
        heads=heads,
        decision=decision,
    )


def slots_of(case: Case, blocks: int) -> Tensor:
    """Any order; one padding slot where there is more than one token."""
    slots = torch.randperm(blocks * case.page)[: case.tokens]
    if case.tokens > 1:
        slots[case.tokens // 2] = -1
    return slots


def difference(found: Tensor, wanted: Tensor) -> float:
    """Over max(1, value); infinite where one is NaN and the other is not."""
    if not torch.equal(found.isnan(), wanted.isnan()):
        return float("inf")
    off = (found.float() - wanted.float()).abs() / wanted.float().abs().clamp_min(1)
    return float(off.nan_to_num(0.0).max())


def grid_points(out: Tensor, work: TokenWork) -> Tensor:
    """``[2, T, W]`` of output ``[2, H, T, D]``, as whoever attacks finds them."""
    x = out.double().transpose(1, 2).flatten(2)
    z = (x - work.center[:, None].double()) / work.scale[:, None].double()
    if work.gate and work.gate.expand is not None:
        z = torch.linalg.solve(work.gate.expand.double(), z, left=False)
    return (z * (STEPS / work.noise)).round()


def rewrite_and_place(case: Case, device: str) -> Off:
    """Beside the reference, on the same pages."""
    from lcguard.ops import kv_rewrite

    torch.manual_seed(0)
    kv_rewrite.MANY_TILES = 1 if case.long else 256
    dtype, heads = getattr(torch, case.dtype), (case.shard or (0, case.heads))[1]
    blocks = -(-case.tokens // case.page) + 1
    sizes = case.layout, blocks, heads, case.page, case.dim, dtype, device
    rotary, slots = rotary_of(case.dim, case.rotated), slots_of(case, blocks).to(device)
    segment = [torch.randn(heads, case.tokens, case.dim).to(device, dtype) for _ in range(2)]
    pages, expected = pages_of(*sizes), pages_of(*sizes)
    kv_rewrite.place_layer(*segment, slots, rotary, case.start, *pages)
    reference.place_layer(*segment, slots, rotary, case.start, *expected)
    placed = max(difference(a, b) for a, b in zip(pages, expected, strict=True))
    work = work_for(case, device)
    shape = 2, heads, case.tokens, case.dim
    out, wanted = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    kv_rewrite.rewrite_layer(*expected, slots, rotary, case.start, work, out[0], out[1])
    reference.rewrite_layer(*expected, slots, rotary, case.start, work, wanted[0], wanted[1])
    if not work.noise or dtype != torch.float32:
        # 16-bit output is coarser than the grid: its steps are within the tolerance
        return Off(difference(out, wanted), placed)
    live = slots >= 0
    found, right = (grid_points(x[:, :, live], work) for x in (out, wanted))
    apart = (found - right).abs()
    # a gate's expansion spreads one point over its token, the others keep to their channel
    mixed = apart.amax(2, keepdim=True).expand_as(apart) if work.gate else apart
    same = torch.ones(2, case.tokens, apart.shape[2], dtype=torch.bool, device=device)
    same[:, live] = mixed == 0
    same = same.unflatten(2, (heads, case.dim)).transpose(1, 2)
    return Off(
        difference(out[same], wanted[same]),
        placed,
        float(apart.max()),
        float((apart > 0).double().mean()),
    )


def run(device: str, report: Callable[[str, list[float]], None]) -> None:
    from tests.ops.triton_cipher import cipher, grid

    report("cipher", [*cipher(device), *grid(device)])
    for name, case in CASES.items():
        report(name, list(astuple(rewrite_and_place(case, device))))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    run("cpu", found.__setitem__)
    print(json.dumps(found))
