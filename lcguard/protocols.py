"""What training and evaluation know of the other rooms: tensors, guards, attacks, model runs.

Core code imports none of ``lcguard.agents``, ``lcguard.attacks``, ``lcguard.server``; it receives
their objects through the protocols of this file.

Shapes everywhere: B batch, L layers, H KV heads, T tokens, D head dim, C categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.tokens import Secret as Secret
from lcguard.tokens import Special, TokenRecord


@dataclass(frozen=True)
class KVBatch:
    """Un-rotated keys and values of B token ranges, right-padded to the longest.

    Keys are taken after the key norm and before rotation, so they hold no position; padding
    entries are never read by a receiver (``valid`` masks them).
    """

    keys: Tensor
    """``[B, L, H, T, D]``."""
    values: Tensor
    """``[B, L, H, T, D]``."""
    valid: Tensor
    """``[B, T]`` bool: False at padding."""

    def to(self, *args: Any, **kwargs: Any) -> KVBatch:
        """Moves keys and values; ``valid`` follows the device only."""
        keys = self.keys.to(*args, **kwargs)
        return KVBatch(keys, self.values.to(*args, **kwargs), self.valid.to(keys.device))

    def __len__(self) -> int:
        return self.keys.shape[0]

    def __getitem__(self, index: Any) -> KVBatch:
        """Selects records (a slice or an index tensor, never a bare integer)."""
        return KVBatch(self.keys[index], self.values[index], self.valid[index])

    def trim(self) -> KVBatch:
        """The same batch without the columns that are padding for every record."""
        n = int(self.valid.sum(1).max()) if len(self) else 0
        return KVBatch(self.keys[..., :n, :], self.values[..., :n, :], self.valid[:, :n])

    @staticmethod
    def join(parts: Sequence[KVBatch]) -> KVBatch:
        """Segments behind each other, record by record: ``[B, L, H, sum T, D]`` without gaps.

        Padding of the parts ends up at the end of each row. Raises ``ValueError`` for no parts.
        """
        if not parts:
            raise ValueError("no segments to join: give at least one")
        valid = torch.cat([p.valid for p in parts], 1)
        order = torch.argsort((~valid).int(), dim=1, stable=True)  # valid entries first, in order
        at = order[:, None, None, :, None]

        def gather(tensors: Sequence[Tensor]) -> Tensor:
            whole = torch.cat(list(tensors), 3)
            return whole.gather(3, at.expand(-1, *whole.shape[1:3], -1, whole.shape[4]))

        keys, values = gather([p.keys for p in parts]), gather([p.values for p in parts])
        return KVBatch(keys, values, valid.gather(1, order)).trim()

    @staticmethod
    def stack(rows: Sequence[KVBatch]) -> KVBatch:
        """Batches of any number of records and tokens as one, padded to the longest.

        Raises ``ValueError`` for no rows.
        """
        if not rows:
            raise ValueError("no segments to stack: give at least one")
        width = max(r.valid.shape[1] for r in rows)

        def wide(x: Tensor) -> Tensor:
            # padding by nothing copies too
            return x if x.shape[3] == width else F.pad(x, (0, 0, 0, width - x.shape[3]))

        keys, values = (
            torch.cat([wide(x) for x in xs])
            for xs in ([r.keys for r in rows], [r.values for r in rows])
        )
        valid = torch.cat([F.pad(r.valid, (0, width - r.valid.shape[1])) for r in rows])
        return KVBatch(keys, values, valid)

    def features(self) -> Tensor:
        """All layers' keys and values of a token side by side: ``[B, T, L * 2 * H * D]``."""
        both = torch.stack((self.keys, self.values), 2)  # [B, L, 2, H, T, D]
        return both.permute(0, 4, 1, 2, 3, 5).flatten(2)


@dataclass(frozen=True)
class Mask:
    """Which categories a receiver may not learn, per record.

    ``forbid[c]`` hides category c. ``derive[c]`` only matters where ``forbid[c]``: the derived
    value (a band, an age group) stays allowed while the exact value is hidden.
    """

    forbid: Tensor
    """``[B, C]`` bool."""
    derive: Tensor
    """``[B, C]`` bool."""

    def vector(self) -> Tensor:
        """Float conditioning vector ``[B, 2C]``."""
        return torch.cat((self.forbid, self.forbid & self.derive), -1).float()

    def __getitem__(self, index: Any) -> Mask:
        return Mask(self.forbid[index], self.derive[index])


@dataclass(frozen=True)
class Guarded:
    """What a guard gives back."""

    kv: KVBatch
    withheld: Tensor
    """``[B, T]`` in 0..1: share of a token's entries that was withheld."""


@runtime_checkable
class Guard(Protocol):
    """A frozen transform of a whole segment (all layers, all tokens of the handoff)."""

    name: str
    needs_twin: bool
    """True where the guard sends the KV of the twin instead (secret spans known, or found)."""
    keeps_later: bool
    """True where it sends raw entries of the tokens that the twin does not replace."""
    placeholder: str
    """What stands for a value in that twin."""

    def marks(self, kv: KVBatch, mask: Mask) -> Tensor | None:
        """What it finds itself in raw KV, ``[B, T]``: a token's category, -1 where it stays; None
        for a guard that is told."""
        ...

    def opened(self, kv: KVBatch) -> KVBatch:
        """What an entitled audience reads of a segment: itself, but for a guard of the wire alone,
        which is undone with its key."""
        ...

    def __call__(
        self,
        kv: KVBatch,
        mask: Mask,
        *,
        keys: Sequence[bytes] | None = None,
        twin: KVBatch | None = None,
    ) -> Guarded:
        """Rewrites ``kv``. Noise is a function of each segment's key, drawn once per segment:
        32 secret bytes, fresh ones where ``keys`` is None.

        Raises ``ValueError`` where ``needs_twin`` and no twin is given.
        """
        ...


@dataclass(frozen=True)
class AttackData:
    """What a white-box attacker holds: guarded segments with the secrets that went in.

    Training pairs have all fields. For the records under attack only ``kv``, ``mask``, ``prompts``
    and the identity of the wanted field may be used; the secrets serve to score. An attack that
    states that it knows the rest of a record also reads ``records``.
    """

    kv: KVBatch
    context_ids: Tensor
    """``[B, T]`` long, padding = -100: what the attacker's own copy of the sender read, a dense
    auxiliary target."""
    secrets: Sequence[Sequence[Secret]]
    """Per record."""
    record_ids: Sequence[str]
    mask: Mask
    special: Special
    """Of the agents' tokenizer."""
    prompts: Sequence[Sequence[Sequence[int]]]
    """For each record and secret the tokens of a question about it."""
    records: Sequence[TokenRecord] | None = None
    """What the senders read; None for joint segments, which are of several."""
    segments: Tensor | None = None
    """``[B, T]`` long: of a joint segment, which part a token is of; None for single ones."""
    parts: int = 1
    """Segments in a joint one."""
    on: KVBatch | None = None
    """What each sender had consumed before; None where no sender had."""
    fixed_length: bool = False
    """True where the guard also hides how long each value was."""
    planted: tuple[int, ...] = ()
    """Message that the senders read before their records."""

    def __len__(self) -> int:
        return len(self.record_ids)

    def with_kv(self, kv: KVBatch) -> AttackData:
        return replace(self, kv=kv)

    def subset(self, index: Sequence[int]) -> AttackData:
        rows = torch.as_tensor(list(index), dtype=torch.long)
        return replace(
            self,
            kv=self.kv[rows],
            context_ids=self.context_ids[rows],
            secrets=[self.secrets[i] for i in index],
            record_ids=[self.record_ids[i] for i in index],
            mask=self.mask[rows],
            prompts=[self.prompts[i] for i in index],
            records=None if self.records is None else [self.records[i] for i in index],
            segments=None if self.segments is None else self.segments[rows],
            on=None if self.on is None else self.on[rows],
        )


class Ranked(NamedTuple):
    """Where the true value came in a list of candidates."""

    size: int
    """Candidates in the list, the true one included."""
    rank: int
    """1 is first."""
    nats: float
    """Logarithm of the true value's posterior over its prior, 1 / size."""


@dataclass(frozen=True)
class Guess:
    """One attempt at one secret."""

    record_id: str
    category: str
    field: str
    ids: tuple[int, ...] | None
    """Guessed token ids; None where the attack could not be scored (an error)."""
    nll_nats: float | None = None
    """Cross-entropy of the true value under the attacker, in nats over the whole value."""
    token_accuracy: float | None = None
    """Share of the value's tokens right, each given the true ones before it."""
    lists: Mapping[int, Ranked] | None = None
    """By the size asked for, from an attack that chooses from lists."""
    length_nats: float | None = None
    """What the value's number of tokens alone tells, for such an attack."""


@runtime_checkable
class Attack(Protocol):
    """``fit`` on guarded pairs, then ``recover`` from segments of records it never saw."""

    @property
    def name(self) -> str: ...

    @property
    def goal(self) -> str: ...

    @property
    def access(self) -> str: ...

    def fit(self, pairs: AttackData, *, seed: int = 0) -> Attack: ...

    def recover(self, data: AttackData) -> list[Guess]: ...
