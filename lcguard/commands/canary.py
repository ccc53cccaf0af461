"""``python -m lcguard.commands.canary``: screens edges of a running proxy with planted records.

    {"base_url": ..., "token": ..., "model": ..., "served_model": ..., "store": ..., "edges": [...]}

One JSON object on standard input. On standard output a line ``{"result": {...}}`` as soon as an
edge is screened, and last ``{"results": [...]}`` with all of them; the log is standard error.
Generated records are published over each edge as any agent's would be; a fresh attack is fitted on
half of the segments that come out of the live guard and recovers the forbidden values of the rest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcguard.agents.nano.load import model_path
from lcguard.agents.scenarios.encode import Encoder
from lcguard.categories import Category
from lcguard.commands.canary_plant import AppliedGuard, Plant, Planter, PlantError
from lcguard.commands.canary_records import fitting_records, screening_records
from lcguard.commands.canary_screen import screen
from lcguard.handoff.keys import deployment_key
from lcguard.manifest import SegmentError
from lcguard.protocols import AttackData, KVBatch
from lcguard.records import TokenRecord
from lcguard.store import StoreError, open_store
from lcguard.tokens import Special
from lcguard.training.dataset import attack_data


class EdgeJob(BaseModel):
    """An edge to screen, under concrete names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str
    source: str
    audience: str
    forbid: tuple[Category, ...]
    derive: tuple[Category, ...] = ()
    guard: str = ""
    """Expected guard; an edge that publishes under another one is an error. Empty: any."""
    guard_digest: str = ""
    """Likewise, of a registry's live version."""

    @property
    def names(self) -> dict[str, str]:
        return {"tenant": self.tenant, "source": self.source, "audience": self.audience}


class Job(BaseModel):
    """What a run is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str
    token: str
    model: str
    """Folder or hub repository of the served model, for its tokenizer alone; or ``nano``."""
    served_model: str
    store: str
    edges: tuple[EdgeJob, ...]
    train_records: Annotated[int, Field(ge=8)] = 96
    test_records: Annotated[int, Field(ge=8)] = 64
    attack: Literal["probe", "linear"] = "probe"
    seed: Annotated[int, Field(ge=0)] = 0
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    limit: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Success rate above which a category leaks by itself."""


@dataclass
class Canaries:
    """One run over all edges of a job."""

    job: Job
    encoder: Encoder
    special: Special
    planter: Planter
    say: Callable[[dict[str, Any]], None] = lambda result: None
    """Told each result at once."""

    def results(self) -> list[dict[str, Any]]:
        """One for each edge, in the job's order. What fails is an edge's error."""
        known: dict[tuple[AppliedGuard, tuple[Category, ...]], tuple[str, dict[str, Any]]] = {}
        out = []
        for edge in self.job.edges:
            out.append({**edge.names, **self._tried(edge, known)})
            self.say(out[-1])
        return out

    def _tried(self, edge: EdgeJob, known: dict[Any, Any]) -> dict[str, Any]:
        if not edge.forbid:
            return {"skipped": "forbids nothing"}
        try:
            return self._screened(edge, known)
        except (PlantError, SegmentError, StoreError, ValueError) as error:
            return {"error": " ".join(str(error).split())[:300]}

    def _screened(self, edge: EdgeJob, known: dict[Any, Any]) -> dict[str, Any]:
        started, job = time.monotonic(), self.job
        test = screening_records(self.encoder, edge.forbid, job.test_records, job.seed + 1)
        first = self.planter.plant(edge.names, test[:1])
        applied = self._checked(edge, first)
        key = applied, edge.forbid
        if key in known:
            # the guard does not know the edge's name: what leaks there leaks here
            leader, figures = known[key]
            return {
                **figures,
                "policy_digest": first[0].policy_digest,
                "shared_with": leader,
                "seconds": round(time.monotonic() - started, 1),
            }
        train = fitting_records(self.encoder, edge.forbid, job.train_records, job.seed)
        rest = self.planter.plant(edge.names, [*test[1:], *train])
        plants = [*first, *rest]
        planted_s = time.monotonic() - started
        self._checked(edge, plants)
        n = len(test)
        found = screen(
            self._pairs(train, plants[n:]),
            self._pairs(test, plants[:n]),
            job.attack,
            seed=job.seed,
            level=job.level,
            limit=job.limit,
        )
        figures = {
            **found.figures._asdict(),
            "attack": f"{job.attack} on {found.category}" if found.category else job.attack,
            "guard": applied.guard,
            "guard_digest": applied.guard_digest,
            "policy_digest": first[0].policy_digest,
            "seconds": round(time.monotonic() - started, 1),
        }
        name = "/".join(edge.names.values())
        print(
            f"{name}: {len(plants)} records planted in {planted_s:.1f} s, "
            f"{figures['seconds']} s in all",
            file=sys.stderr,
            flush=True,
        )
        known[key] = name, figures
        return figures

    def _checked(self, edge: EdgeJob, plants: Sequence[Plant]) -> AppliedGuard:
        """What all plants were published under. Raises ``PlantError`` for another guard or rule
        than the job's."""
        applied, policy = plants[0].applied, plants[0].policy_digest
        if any((p.applied, p.policy_digest) != (applied, policy) for p in plants):
            raise PlantError("guard or policy changed while records were planted")
        if edge.guard and applied.guard != edge.guard:
            raise PlantError(
                f"published under guard {applied.guard!r}, the job says {edge.guard!r}"
            )
        if edge.guard_digest not in ("", applied.guard_digest):
            raise PlantError(
                f"published under guard {applied.guard_digest[:12]}, the registry has "
                f"{edge.guard_digest[:12]} live"
            )
        if missing := sorted(set(edge.forbid) - set(applied.rule.forbid)):
            raise PlantError(f"published without hiding {', '.join(missing)}: the policy changed")
        return applied

    def _pairs(self, records: Sequence[TokenRecord], plants: Sequence[Plant]) -> AttackData:
        return attack_data(records, KVBatch.stack([p.kv for p in plants]), self.special)


def open_canaries(job: Job) -> Canaries:
    """Tokenizer and store. Raises ``ValueError`` and ``StoreError``."""
    from transformers import AutoTokenizer

    path = str(model_path()) if job.model == "nano" else job.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the tokenizer of {job.model!r} cannot be loaded: {first}") from None
    encoder = Encoder(tokenizer)
    planter = Planter(
        job.base_url, job.token, job.served_model, encoder, open_store(job.store), deployment_key()
    )
    return Canaries(job, encoder, Special.of(tokenizer, len(tokenizer)), planter)


def main() -> int:
    """Reads a job, writes its results; 2 for a job that cannot be done at all."""
    import torch

    torch.set_num_threads(1)
    os.nice(10)
    out = sys.stdout

    def say(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=out, flush=True)

    try:
        job = Job.model_validate_json(sys.stdin.buffer.read())
        with redirect_stdout(sys.stderr):  # a library's chatter is no result
            canaries = open_canaries(job)
            canaries.say = lambda result: say({"result": result})
            say({"results": canaries.results()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        print(f"job: {'.'.join(map(str, first['loc']))}: {first['msg']}", file=sys.stderr)
        return 2
    except (ValueError, StoreError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
