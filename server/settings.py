"""Options of the proxy: one YAML file, unknown keys refused (``lcguard.config``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

Seconds = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class UpstreamSettings:
    """How vLLM is called."""

    url: str = ""
    """Base URL of a running vLLM with the connector; empty: ``lcguard serve`` starts one."""
    api_key_env: str = "LCGUARD_UPSTREAM_KEY"
    """Environment variable with vLLM's ``VLLM_API_KEY``; without it the proxy gets not ready."""
    connect_timeout_s: Seconds = 5.0
    """How long vLLM may take to accept a connection."""
    read_timeout_s: Seconds = 120.0
    """Longest silence between two pieces of an answer."""
    total_timeout_s: Seconds = 600.0
    """From a request's place at vLLM to the end of its answer, as the client took it."""
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    """Further tries where no byte of an answer came: vLLM refused or dropped the connection."""


@dataclass(frozen=True)
class LimitSettings:
    """Of the whole proxy; each key has its own besides (``lcguard keys new --help``)."""

    max_body_bytes: Count = 4 * 2**20
    """413 above."""
    max_output_tokens: Count = 8192
    """Most that a request may generate, all its prompts and answers together; said to vLLM where a
    chat states no maximum."""
    body_timeout_s: Seconds = 10.0
    """For a request's head and for its body, each."""
    write_timeout_s: Seconds = 30.0
    """How long a client may leave its answer untaken before its connection is cut."""
    redact_timeout_s: Seconds = 30.0
    """How long a publish waits for what to redact in it to be found; one search runs at a time."""
    key_concurrency: Count = 32
    """Requests of one key at a time, where the key does not say."""
    max_concurrency: Count = 256
    """Requests at vLLM at a time."""
    max_queue: Annotated[int, Field(ge=0)] = 256
    """Requests that wait for a place; 429 beyond."""
    queue_timeout_s: Seconds = 30.0
    """How long one waits for a place; 429 after it."""


@dataclass(frozen=True)
class CanarySettings:
    """Planted records that pass the live guard and are attacked."""

    enabled: bool = True
    """Whether edges are screened; without it none ever closes."""
    interval_s: Seconds = 3600.0
    """From the end of one screening of all edges to the next."""
    timeout_s: Seconds = 900.0
    """Of one screening, which is ended then and counts as failed."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """An edge closes where the lower bound of the attack's success rate is above this."""
    train_records: Annotated[int, Field(ge=8)] = 96
    """Planted on each edge, for the attack to be fitted on."""
    test_records: Annotated[int, Field(ge=8)] = 64
    """Planted on each edge besides, whose secrets the attack is asked for."""
    attack: str = "probe"
    """A name of ``lcguard eval list --attacks``."""


@dataclass(frozen=True)
class EngineSettings:
    """The vLLM that ``lcguard serve`` starts."""

    model: str = "nano"
    """A name (``lcguard models list``), folder or hub repository."""
    served_model_name: str = ""
    """Default: the model's name."""
    guards: dict[str, str] = field(default_factory=dict)
    """Guard name as the policy uses it -> folder, hub repository or ``MODEL:NAME``; empty: those
    that come with the model."""
    unproven: tuple[str, ...] = ()
    """Guards that are served though nothing was measured of them, or that they leak."""
    untested_vllm: str = ""
    """Version of vLLM that may be started though this release was not tested with it, such as
    ``0.33.0``; its own checks and the proxy's decide then whether it serves."""
    args: tuple[str, ...] = ()
    """Further arguments of vLLM's server."""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """Lowers the engine's priority: on a full machine the proxy's small pieces of work come first,
    and a request waits for the engine alone."""
    start_timeout_s: Seconds = 300.0
    """A vLLM that does not serve within it is ended, and counts as one that died."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often within ``restart_window_s`` a vLLM that died is started again soon."""
    restart_window_s: Seconds = 600.0
    """A death is forgotten after so long."""


@dataclass(frozen=True)
class ServerSettings:
    """The file ``server.yaml``. Relative paths are within the state folder."""

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` for all of this machine."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0: any that is free."""
    policy: Path = Path("policy.yaml")
    """Read again as it changes. While it is absent, every category is forbidden on every edge and
    the guard is ``redact``."""
    keys: Path = Path("keys.yaml")
    """Written by ``lcguard keys new`` and ``revoke``; read again as it changes."""
    database: str = "lcguard.sqlite"
    """Audit and ledger: a file of one proxy, or ``postgresql://user@host/name`` of several. The
    password is in ``LCGUARD_DATABASE_PASSWORD``, or in a file (``?passfile=``)."""
    database_timeout_s: Seconds = 2.0
    """How long a locked database is waited for before a handoff is refused."""
    store: str = ""
    """URL of the segment store that vLLM uses too; empty: the folder ``segments``."""
    store_max_bytes: Annotated[int, Field(gt=0)] | None = None
    """Of the tensors of all segments together: putting above it removes the oldest. Null: no
    bound."""
    store_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """How long one request waits for one answer of the store; nobody else waits for it."""
    prefix_cache: Literal["agent", "tenant"] = "agent"
    """Whose plain prompts share vLLM's prefix cache. ``tenant`` saves work where agents of a tenant
    send the same beginnings, and lets each of them find out by ``cached_tokens``, or by the time of
    an answer, what the others have sent. Published prompts and segments are never shared."""
    metrics_auth: bool = True
    """Whether ``/metrics`` asks for a key, an admin's or an auditor's. Without one it never names
    edges or counts tokens."""
    drain_s: Seconds = 30.0
    """Time for running requests after SIGTERM."""
    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    canaries: CanarySettings = field(default_factory=CanarySettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
