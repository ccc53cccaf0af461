"""Runs tracked on an MLflow server: parameters, metrics over steps, final figures, small files.

What a run's folder holds is the truth and the server gets a copy: a run that was interrupted goes
on in the run that it has there (``mlflow.json``), and the server itself says which steps it has
already. A server that fails once a run has begun costs a warning and no more.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.mlflow_server import MlflowError, MlflowServer

T = TypeVar("T")
EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
FILE = "mlflow.json"
STEP = "step/"
"""Before the names of metrics over steps."""
UNSENT = frozenset({"explained", "command"})
"""Keys of files that stay here: contexts of records, and command lines, in which a database's
password may stand."""
_PARAMS, _METRICS, _TAGS = 100, 1000, 100  # that one request may hold
_LONGEST = 5000  # of a value of a parameter or tag: MLflow takes 6000 and 5000


@dataclass(frozen=True)
class Tracker:
    """An experiment of a server."""

    server: MlflowServer
    experiment: str
    """Its id."""

    @classmethod
    def open(cls, uri: str | None) -> Tracker | None:
        """The experiment ``lcguard``, or the one that ``MLFLOW_EXPERIMENT_NAME`` names; made if it
        is not there. None without an address.

        Raises ``ValueError`` in one line for a server that cannot be reached.
        """
        if uri is None:
            return None
        server, name = MlflowServer(uri), os.environ.get(EXPERIMENT) or "lcguard"
        try:
            found = server.get("experiments/get-by-name", experiment_name=name)["experiment"]
        except MlflowError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return cls(server, str(server.post("experiments/create", name=name)["experiment_id"]))
        return cls(server, str(found["experiment_id"]))


class TrackedRun:
    """One run; none of the methods does anything without a server."""

    def __init__(
        self,
        server: MlflowServer | None = None,
        run_id: str = "",
        artefacts: str = "",
        say: Callable[[str], None] = print,
    ) -> None:
        self._server, self._id, self._artefacts, self._say = server, run_id, artefacts, say
        self._next: int | None = None
        self._warned = False

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows of a metrics journal so far, each with its ``step``; those that the server has
        are not sent again."""
        self._try(lambda server: self._send_rows(server, rows))

    def figures(self, found: Mapping[str, Any]) -> None:
        """Final figures; what was not measured is left out."""
        metrics = _metrics(found, 0)
        self._try(lambda server: self._log(server, metrics=metrics))

    def tags(self, found: Mapping[str, str]) -> None:
        self._try(lambda server: self._log(server, tags=_texts(found)))

    def params(self, config: Mapping[str, Any]) -> None:
        """A resolved configuration, by dotted names."""
        self._try(lambda server: self._log(server, params=_texts(flat(config))))

    def artefact(self, name: str, found: Mapping[str, Any]) -> None:
        """A small JSON file, where the server takes files for its runs itself; without what
        ``UNSENT`` names."""
        scheme, _, where = self._artefacts.partition(":")
        if scheme == "mlflow-artifacts":
            data = (json.dumps(_sent(found), indent=1) + "\n").encode()
            path = f"{where.strip('/')}/{name}"
            self._try(lambda server: server.put_artefact(path, data))

    def end(self, status: str) -> None:
        self._try(lambda server: self._update(server, status))

    def _update(self, server: MlflowServer, status: str) -> None:
        ended = {} if status == "RUNNING" else {"end_time": _now()}
        server.post("runs/update", run_id=self._id, status=status, **ended)

    def _send_rows(self, server: MlflowServer, rows: Sequence[Mapping[str, Any]]) -> None:
        first = self._known(server) if self._next is None else self._next
        self._next = None  # asked again, where it is not known how much of this arrived
        new = [row for row in rows if row["step"] >= first]
        wide = max((len(row) for row in new), default=1)
        for part in _parts(new, max(1, _METRICS // wide)):
            self._log(
                server,
                metrics=[
                    m
                    for row in part
                    for m in _metrics(
                        {STEP + k: v for k, v in row.items() if k != "step"}, row["step"]
                    )
                ],
            )
        self._next = new[-1]["step"] + 1 if new else first

    def _known(self, server: MlflowServer) -> int:
        """The first step that the server lacks."""
        found = server.get("runs/get", run_id=self._id)["run"]["data"].get("metrics", [])
        return max((int(m["step"]) + 1 for m in found if m["key"].startswith(STEP)), default=0)

    def _log(
        self,
        server: MlflowServer,
        *,
        metrics: Sequence[dict[str, Any]] = (),
        params: Sequence[dict[str, str]] = (),
        tags: Sequence[dict[str, str]] = (),
    ) -> None:
        for kind, found, size in (
            ("metrics", metrics, _METRICS),
            ("params", params, _PARAMS),
            ("tags", tags, _TAGS),
        ):
            for part in _parts(found, size):
                server.post("runs/log-batch", run_id=self._id, **{kind: list(part)})

    def _try(self, send: Callable[[MlflowServer], None]) -> None:
        if self._server is None:
            return
        try:
            send(self._server)
        except (ValueError, KeyError, TypeError) as error:  # also what is no server's answer
            if not self._warned:
                self._say(f"not tracked: {error}; the run goes on")
            self._warned = True


@contextmanager
def track(
    tracker: Tracker | None,
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    say: Callable[[str], None] = print,
) -> Iterator[TrackedRun]:
    """The run of a folder, made or gone on with; ends as what is done within it ends.

    Raises ``ValueError`` where the server fails before anything is done.
    """
    if tracker is None:
        yield TrackedRun()
        return
    found = _kept(tracker, folder) or _made(tracker, folder, kind)
    run = TrackedRun(tracker.server, found["run_id"], found.get("artifact_uri", ""), say)
    run.end("RUNNING")
    run.params(config)
    run.tags(tags)
    try:
        yield run
    except BaseException as error:
        run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.end("FINISHED")


def _kept(tracker: Tracker, folder: Path) -> dict[str, Any] | None:
    """What the server says of the folder's run; None where it has none there."""
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if kept["uri"] != tracker.server.uri:
            return None
        info = dict(tracker.server.get("runs/get", run_id=kept["run_id"])["run"]["info"])
    except FileNotFoundError:
        return None
    except MlflowError as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} cannot be read ({error}): delete it") from None
    return info if info.get("lifecycle_stage") != "deleted" else None


def _made(tracker: Tracker, folder: Path, kind: str) -> dict[str, Any]:
    made = tracker.server.post(
        "runs/create",
        experiment_id=tracker.experiment,
        run_name=f"{kind} {folder.name}",
        start_time=_now(),
        tags=_texts({"lcguard.kind": kind}),
    )
    info = dict(made["run"]["info"])
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"uri": tracker.server.uri, "run_id": info["run_id"]}
    replace_file(folder / FILE, (json.dumps(kept) + "\n").encode(), mode=PUBLIC)
    return info


def flat(found: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings by dotted names; lists of them by their places."""
    out: dict[str, Any] = {}
    for key, value in found.items():
        name = f"{before}{key}"
        if isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{name}.")
        else:
            out[name] = value
    return out


def _sent(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {k: _sent(v) for k, v in found.items() if k not in UNSENT}
    return [_sent(v) for v in found] if isinstance(found, list | tuple) else found


def _metrics(found: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """Of finite numbers alone: MLflow's stores take no others, or not all of them."""
    now = _now()
    return [
        {"key": _name(k), "value": float(v), "timestamp": now, "step": step}
        for k, v in found.items()
        if isinstance(v, int | float) and math.isfinite(v)
    ]


def _texts(found: Mapping[str, Any]) -> list[dict[str, str]]:
    texts = {_name(k): v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}
    return [{"key": k, "value": v[:_LONGEST]} for k, v in texts.items()]


def _parts(found: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (found[i : i + size] for i in range(0, len(found), size))


def _name(text: str) -> str:
    """With the characters that MLflow takes in names."""
    return re.sub(r"[^\w./ -]", "_", text)[:250]


def _now() -> int:
    return int(time.time() * 1000)
