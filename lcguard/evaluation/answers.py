"""Does the receiver answer right? Two metrics: by what it says, and by what it would have to say.

``said``: greedy replies, right where they say the value (``lcguard.evaluation.said``); how chat
models are scored, who speak in sentences. ``exact``: teacher-forced exact match of the bare value,
for models that answer so, like the nano agent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from lcguard.evaluation.said import says
from lcguard.protocols import KVBatch
from lcguard.records import TokenRecord
from lcguard.source import ModelSource, Wanted

Scoring = Literal["exact", "said"]
VALUE_ONLY = " Answer with the value only."
"""What questions to a chat model end with."""
REPLY_TOKENS = 40
_BATCH = 32


@torch.no_grad()
def said_right(
    source: ModelSource,
    decode: Callable[[Sequence[int]], str],
    records: Sequence[TokenRecord],
    kv: KVBatch,
    wanted: Wanted = lambda r, q: True,
) -> list[list[bool]]:
    """Per record and wanted question: does the greedy reply say the answer?

    Args:
        kv: a segment a record, ``[B, L, H, T, D]``.
    """
    asked = [
        (i, q) for i, r in enumerate(records) for q in r.questions if q.answer and wanted(r, q)
    ]
    # rows of similar length together: less padding, in the segment and in the question
    order = sorted(range(len(asked)), key=lambda k: (len(records[asked[k][0]].ids), k))
    right = [False] * len(asked)
    for first in range(0, len(order), _BATCH):
        at = order[first : first + _BATCH]
        rows = torch.tensor([asked[k][0] for k in at])
        questions = [asked[k][1] for k in at]
        end = questions[0].answer[-1]
        replies = source.generate(kv[rows].trim(), [q.prompt for q in questions], REPLY_TOKENS, end)
        for k, q, reply in zip(at, questions, replies, strict=True):
            right[k] = says(decode(reply), decode(q.answer[:-1]))
    out: list[list[bool]] = [[] for _ in records]
    for (i, _), ok in zip(asked, right, strict=True):
        out[i].append(ok)
    return out
