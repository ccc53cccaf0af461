"""``lcguard init``: policy, server and training configuration for a model, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lcguard.agents.models import NAMED, model_location
from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.categories import CATEGORIES
from lcguard.hub import supported_config
from lcguard.private_files import private_folder
from lcguard.training.estimate import estimate, fitting_batch, machine_bytes

STEPS = 900

_POLICY = """\
# What may pass from agent to agent. Names are those of `lcguard keys new`; `*` is everyone.
# All keys: `lcguard policy schema`; check it with `lcguard policy check {policy}`.
version: 1
edges:
  - source: intake
    audience: billing
    forbid: [{categories}]
    guard: redact             # the publisher names its secrets; guards that find them: see below
    ttl_s: 3600
  - source: "*"               # whoever is not named: everything is forbidden
    audience: "*"
    forbid: [{categories}]
...
"""
_SERVER = """\
# `lcguard serve --dir {state}`; all options with their values: `lcguard config show --dir {state}`.
engine:
  model: {model}
{guards}"""
_OWN = """\
  # A guard of your own, once it is trained and measured; until an evaluation of it is recorded it
  # is served with `unproven: [gate]` alone.
  # guards: {{gate: {out}/guard}}
"""
_TRAIN = """\
# `lcguard train {train} --data records.jsonl --out {out}`: {line}.
model: {model}
data: {{source: jsonl, train_records: 800, test_records: 200}}
train:
  guard: gate
  options: {{noise: 0.2, width: 96, blocks: 2, words: 8}}
  steps: {steps}
  label_steps: 200
  label_weight: 1.0
  optimizer: muon
  batch: {batch}               # memory and time grow with it
  pair_weight: 0.8
  leak_scale_nats: 4.0
"""


def init(model: str, folder: Path, say: Callable[[str], None]) -> None:
    """Writes ``.lcguard/policy.yaml``, ``.lcguard/server.yaml`` and ``train.yaml`` into ``folder``.

    Raises ``ValueError`` in one line for a model that is not supported, and for a file that is
    there already: nothing is written then.
    """
    state = folder / ".lcguard"
    policy, server, train = state / "policy.yaml", state / "server.yaml", folder / "train.yaml"
    for path in (policy, server, train):
        if path.exists():
            raise ValueError(f"{path} is there already: move it away, or give another --dir")
    config = supported_config(model_location(model, say))
    batch = fitting_batch(config, machine_bytes())
    found, out = estimate(config, batch), folder / "runs" / "guard"
    words = {
        "model": model,
        "policy": policy,
        "state": state,
        "train": train,
        "out": out,
        "batch": batch,
        "steps": STEPS,
        "line": found.line(STEPS),
        "categories": ", ".join(CATEGORIES),
    }
    offered = NAMED[model].guards if model in NAMED else ()
    guards = _OWN.format(**words)
    if offered:
        shipped = ", ".join(f"{name}: {model}:{name}" for name in offered)
        guards = f"  guards: {{{shipped}}}   # came with the model\n"
    private_folder(state)
    for path, text in (
        (policy, _POLICY.format(**words)),
        (server, _SERVER.format(**words, guards=guards)),
        (train, _TRAIN.format(**words)),
    ):
        replace_file(path, text.encode(), mode=PUBLIC)
    for line in (
        f"{policy}: redact between intake and billing, everything forbidden elsewhere",
        f"{server}: serves {model}" + (f" with guard {', '.join(offered)}" if offered else ""),
        f"{train}: a gate on your records, batch {batch}: {found.line(STEPS)}",
        "next:",
        f'  eval "$(lcguard keys new intake billing --dir {state})" && lcguard serve --dir {state}',
        "  lcguard label texts.txt --out records.jsonl   # then check them, and add questions",
        f"  lcguard train {train} --data records.jsonl --out {out}",
    ):
        say(line)
