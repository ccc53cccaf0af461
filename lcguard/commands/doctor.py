"""``lcguard doctor``: what an installation lacks and a deployment would fail on, before it does.

Every check is the one that the command concerned makes itself: of versions the package's own
requirements, of vLLM ``lcguard probe``, of policy and settings ``lcguard config check``, of model
and guards the start of ``lcguard serve``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lcguard.commands import check_machine
from lcguard.commands.checks import Advice, Check, Result, all_hold, as_json, as_lines, results


def report(
    state: Path,
    config: Path | None,
    sets: Sequence[str],
    for_machines: bool,
    say: Callable[[Any], None],
) -> bool:
    """Says what was found; whether nothing fails."""
    found = examine(state, config, sets)
    if for_machines:
        say(json.dumps(as_json(found), indent=1))
    else:
        for line in as_lines(found):
            say(line)
    return all_hold(found)


def examine(state: Path, config: Path | None = None, sets: Sequence[str] = ()) -> list[Result]:
    """All that there is to say about this installation and the deployment in ``state``."""
    found = results(check_machine.package_checks())
    if not all_hold(found):
        return found  # nothing else can be relied on, or loaded
    missing = check_machine.missing_extras()
    if "server" in missing:
        why = {"server": "lcguard serve"}
        return found + results({"extras": lambda: check_machine.check_extras(why, missing)})
    return found + _deployment(state, config, sets, missing)


def _deployment(
    state: Path, config: Path | None, sets: Sequence[str], missing: dict[str, str]
) -> list[Result]:
    # here: they load torch and the server, which may be what is missing
    from lcguard.commands.check_deployment import DeploymentChecks
    from lcguard.commands.serve import load_settings

    try:
        settings = load_settings(state, config, sets, None)
    except ValueError as error:
        return results({"settings": _failing(error)})
    file = config if config is not None else state / "server.yaml"
    told = str(file) if file.exists() else f"the defaults: there is no {file}"
    checks = DeploymentChecks(state, settings)
    needed = checks.needed_extras() if state.is_dir() else {}
    first: dict[str, Check] = {
        "extras": lambda: check_machine.check_extras(needed, missing),
        **_engine_checks(checks),
        "settings": lambda: told,
    }
    if not state.is_dir():
        return results(first | {"state folder": lambda: _no_folder(state)})
    return results(first | checks.checks())


def _engine_checks(checks: Any) -> dict[str, Check]:
    """Of the vLLM that ``lcguard serve`` would start here, and of what it runs on."""
    import torch

    from lcguard.commands.serve import bf16_flag, engine_args
    from lcguard.server.engine import CPU_CACHE, CPU_CACHE_GIB
    from lcguard.vllm.probe import Finding, installed_engine

    def of(finding: Finding) -> str:
        if finding.ok is False:
            raise ValueError(finding.detail)
        return finding.detail

    def memory() -> str:
        if checks.running is not None:
            return "not looked at: the running server has its part already"
        cache = os.environ.get(CPU_CACHE, "")
        free = check_machine.memory_bytes()
        return check_machine.check_memory(free, checks.model_bytes(), cache, CPU_CACHE_GIB)

    if checks.settings.upstream.url:
        return {}  # vLLM runs elsewhere
    untested = checks.settings.engine.untested_vllm
    found: dict[str, Check] = {f.what: partial(of, f) for f in installed_engine(untested)}
    if torch.cuda.is_available():
        return found | {"device": lambda: str(torch.cuda.get_device_name(0))}
    return found | {
        "memory": memory,
        "processor": lambda: check_machine.check_processor(
            bf16_flag(), engine_args(checks.settings)
        ),
    }


def _failing(error: ValueError) -> Check:
    def check() -> str:
        raise error

    return check


def _no_folder(state: Path) -> str:
    text = f"{state} does not exist: lcguard keys new AGENT --dir {state} makes it"
    if state == Path(".lcguard"):
        raise Advice(text)  # an installation that nothing was deployed from yet
    raise ValueError(text)
