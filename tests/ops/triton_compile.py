"""Compiles every kernel for Hopper without a GPU: ``python -m tests.ops.triton_compile``.

The interpreter runs what the compiler refuses. A stand-in for Triton's driver says sm_90; each
kernel then goes through the same specialisation as on a device and stops before its launch. Prints
JSON: kernel to [variants of it, cubin's bytes]. Two keys must share a variant.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from lcguard.noise import noise_key
from lcguard.ops import kv_rewrite
from tests.ops.triton_cases import Case, pages_of, rotary_of, slots_of, work_for

CASES = (
    Case("gaussian", noise=0.3, dim=64, dtype="bfloat16", page=16),
    Case("residual", noise=0.3, dim=40, bottleneck=17, page=16),
    Case("gate", noise=0.3, dtype="float16", page=16),
)


class Hopper(DriverBase):  # type: ignore[misc]
    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def main() -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Hopper())
    found: dict[str, tuple[int, int]] = {}

    def compile_only(kernel: Any, on: Any, n: int, block_t: int, columns: int, args: Any) -> None:
        done = kernel.warmup(grid=(1, columns, 2), **args, BLOCK_T=block_t, enable_fp_fusion=True)
        found[kernel.fn.__name__] = len(kernel.device_caches[0][0]), len(done.asm["cubin"])

    kv_rewrite._launch = compile_only
    for case in CASES:
        dtype, blocks = getattr(torch, case.dtype), 2
        pages = pages_of(case.layout, blocks, case.heads, case.page, case.dim, dtype, "cpu")
        rotary, slots = rotary_of(case.dim), slots_of(case, blocks)
        segment = torch.zeros(2, case.heads, case.tokens, case.dim, dtype=dtype)
        for key in range(3):
            work = work_for(case, "cpu", noise_key(key, "segment"))
            kv_rewrite.rewrite_layer(*pages, slots, rotary, key, work, segment[0], segment[1])
        if case is CASES[0]:
            kv_rewrite.place_layer(segment[0], segment[1], slots, rotary, 7, *pages)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
