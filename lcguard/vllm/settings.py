"""The connector's own settings: vLLM's ``kv_connector_extra_config``, unknown keys refused.

    {"store": "file:///var/lib/lcguard", "policy": "policy.yaml", "guards": {"gate": "nano:gate"}}

The deployment key is not among them, because vLLM logs its configuration: ``LCGUARD_KEY`` has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from lcguard.handoff.policy import Policy, PolicyError, check_finders, parse_policy
from lcguard.handoff.policy_reader import PolicyReader
from lcguard.reloading import ReloadingFile
from lcguard.vllm import CONNECTOR
from lcguard.vllm.errors import StartError

PLAIN = ("identity", "redact")
"""Guards without weights and statistics: usable by name alone."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str
    """URL of the store: ``file:///...``, ``redis://...``, ``memory://NAME`` (one process)."""
    store_max_bytes: Annotated[int, Field(gt=0)] | None = None
    policy: str | dict[str, Any] | None = None
    """Policy file, followed while the engine runs, or its content. None forbids everything on
    every edge."""
    policy_optional: bool = False
    """Whether the file may be missing at first: everything is forbidden until it is there."""
    guards: dict[str, str] = {}
    """Guard name as policies use it -> folder, hub repository or ``nano:NAME``."""
    proxy_only: bool = False
    """Takes handoffs with the proxy's signature alone: whoever else reaches the engine can neither
    publish nor consume. ``lcguard serve`` sets it."""
    store_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """How long one request waits for one answer of the store. Nobody else waits at all."""
    untested_vllm: Annotated[str, StringConstraints(pattern=r"^(\d+(\.\w+)+)?$")] = ""
    """Version of vLLM that may be run though this release was not tested with it, such as
    ``0.33.0``: no other one is let in by it. What is checked at every start decides then."""
    placeholder_id: Annotated[int, Field(ge=0)] | None = None
    """Token that stands for consumed tokens; default the model's padding or end token."""
    neutral_id: Annotated[int, Field(ge=0)] | None = None
    """Token that ``redact`` puts in place of a secret's tokens; default the letter X, in an engine
    without a tokenizer the placeholder."""


def read_settings(extra: Mapping[str, Any]) -> Settings:
    """Checks the settings. Raises ``StartError`` naming the key and the known ones."""
    try:
        return Settings.model_validate(dict(extra))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(Settings.model_fields)
        raise StartError(
            f"kv_connector_extra_config.{where}: {first['msg']} (known: {known})"
        ) from None


def policy_of(
    settings: Settings, finders: Collection[str] = ("redact",)
) -> Policy | ReloadingFile[Policy]:
    """The policy, or one that forbids everything. Raises ``StartError`` for a broken one.

    Args:
        finders: guards that leave out what they are told.
    """
    try:
        nothing = Policy(version=1, edges=())
        if settings.policy is None:
            return nothing
        if isinstance(settings.policy, str):
            absent = nothing if settings.policy_optional else None
            return ReloadingFile(settings.policy, PolicyReader(finders), absent=absent)
        found = parse_policy(settings.policy)
        check_finders(found, finders)
        return found
    except PolicyError as error:
        raise StartError(str(error)) from None


def extra_config(
    store: str,
    policy: str | Path | Mapping[str, Any] | None,
    guards: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """The settings as vLLM's configuration holds them."""
    shown = str(policy) if isinstance(policy, Path) else policy
    return {"store": store, "policy": shown, "guards": dict(guards), **more}


def transfer_config(
    store: str,
    policy: str | Path | Mapping[str, Any] | None,
    guards: Mapping[str, str],
    **more: Any,
) -> Any:
    """vLLM's ``KVTransferConfig`` with the connector and these settings."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="lcguard.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config=extra_config(store, policy, guards, **more),
    )
