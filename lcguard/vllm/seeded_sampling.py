"""Seeded requests on vLLM's CPU engine.

While a prompt is read in pieces, vLLM samples after each and takes the random numbers back by the
generator's offset, which generators on a CPU do not have: in vLLM 0.32 one request with ``seed``
and a prompt longer than a step ends the engine for everybody. Here the numbers are taken back by
the generator's state, so that a seed means the same however a prompt was cut.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_lcguard_wrapped"
_STATE = "_lcguard_generator_state"


def patch_seeded_sampling(runner: Any) -> None:
    """Wraps the class of vLLM's model runner for CPUs. Idempotent."""
    original = runner._bookkeeping_sync
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch, discarded = self.input_batch, self.discard_request_mask.np
        back = {i: g for i, g in batch.generators.items() if discarded[i]}
        for i, generator in batch.generators.items():
            request = self.requests[batch.req_ids[i]]
            if i not in back:
                setattr(request, _STATE, generator.get_state())
            elif (state := getattr(request, _STATE, None)) is not None:
                generator.set_state(state)
            else:
                generator.manual_seed(generator.initial_seed())
        for i in back:
            del batch.generators[i]
        try:
            return original(self, *args, **kwargs)
        finally:
            batch.generators.update(back)

    setattr(bookkeeping, _MARK, True)
    runner._bookkeeping_sync = bookkeeping
