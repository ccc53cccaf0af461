"""What every attack shares: the registry, metadata, and the fitting schedule.

An attack is white-box: it knows the guard's weights, so it can make as many (segment, secret)
pairs as it likes from records of its own. It is fitted from scratch after the guard was frozen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from lcguard.nearest import unknown
from lcguard.protocols import AttackData, Guard, Guess
from lcguard.source import ModelSource
from lcguard.training.adversary import Adversary

Access = Literal["white-box", "grey-box", "black-box"]


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a fitted attack learns."""

    steps: int = 300
    lr: float = 2e-3
    muon_lr: float = 0.02
    """Of the hidden matrices, for attacks that learn them by Muon."""
    batch: int = 48
    warmup: int = 30
    check_every: int = 50
    stop_at: float | None = None
    """Stop once this exact-match rate is reached on held-back training pairs: already broken."""

    def rate(self, step: int) -> float:
        """Warm-up, then cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Knowledge:
    """What the adversary holds beside segments: the agents' model, its words, and the guard."""

    source: ModelSource
    decode: Callable[[Sequence[int]], str]
    """Token ids to text."""
    guard: Guard | None = None
    """The frozen guard with its weights; None where segments cross unguarded."""
    prompt: Callable[[str], Sequence[int]] | None = None
    """A question's text to the tokens that a receiver puts after a segment."""
    encode: Callable[[str], Sequence[int]] | None = None
    """Text to token ids, as inside of a context."""
    sample: Callable[[str, random.Random], str | None] | None = None
    """A plausible value of a field, as text; None for a field that it does not know."""


class BaseAttack:
    """Metadata contract; subclasses define ``Config``, ``fit`` and ``recover``."""

    name: ClassVar[str] = ""
    goal: ClassVar[str] = ""
    access: ClassVar[Access] = "white-box"
    reference: ClassVar[str] = ""
    """The paper or the idea that it is after."""
    fitted: ClassVar[bool] = True
    """False for attacks without parameters of their own."""
    reads_joint: ClassVar[bool] = False
    """True where it reads all segments of a scenario together; else it reads single ones."""
    replies: ClassVar[bool] = False
    """True where its guesses are replies of the receiver's, in the receiver's own words."""
    starts_from: ClassVar[str] = ""
    """The attack that a warm start is fitted by, on raw KV; empty where it always starts cold."""

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.knowledge: Knowledge | None = None

    def equip(self, knowledge: Knowledge) -> None:
        """Hands the attack the model and the guard; called before ``fit``."""
        self.knowledge = knowledge

    @property
    def known(self) -> Knowledge:
        """Raises ``ValueError`` where an attack that needs the model was given none."""
        if self.knowledge is None:
            raise ValueError(
                f"attack {self.name!r} needs the agents' model: call equip(Knowledge(...)) first"
            )
        return self.knowledge

    @classmethod
    def build(cls, options: dict[str, Any] | None = None) -> Self:
        """From plain options. Raises ``ValueError`` naming an unknown one and the known ones."""
        known = [f.name for f in fields(cls.Config)]
        for key in options or {}:
            if key not in known:
                raise ValueError(
                    f"attack {cls.name!r} has no option {key!r}; it has: {', '.join(known)}"
                )
        default = cls.Config()
        values = {k: _value(cls, default, k, v) for k, v in (options or {}).items()}
        return cls(replace(default, **values))

    def options(self) -> dict[str, Any]:
        return asdict(self.config)

    @classmethod
    def clean_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of its options that ``starts_from`` has too."""
        return dict(options)

    @classmethod
    def stressed(cls, options: Mapping[str, Any], steps: int, width: int) -> dict[str, Any]:
        """Options of the same attack with so many times the steps and the width of its networks;
        as they are where it has neither."""
        return dict(options)

    def reschedule(self, **changes: Any) -> None:
        """Changes fields of the ``FitConfig``; nothing where there is none."""

    def start_from(self, clean: BaseAttack) -> None:
        """Starts the next fit from a fitted attack of the kind ``starts_from``."""
        raise ValueError(f"attack {self.name!r} has no warm start: leave out warm")

    def as_adversary(self) -> Adversary:
        """The attack as something that a guard can be trained against, step by step."""
        raise ValueError(f"attack {self.name!r} cannot be an adversary; use decoder or probe")

    def fit(self, pairs: AttackData, *, seed: int = 0) -> BaseAttack:
        raise NotImplementedError(f"attack {self.name!r} defines no fit")

    def recover(self, data: AttackData) -> list[Guess]:
        raise NotImplementedError(f"attack {self.name!r} defines no recover")


class ScheduledAttack(BaseAttack):
    """An attack whose network learns in steps."""

    @dataclass(frozen=True)
    class Config(BaseAttack.Config):
        fit: FitConfig = field(default_factory=FitConfig, kw_only=True)

    @classmethod
    def stressed(cls, options: Mapping[str, Any], steps: int, width: int) -> dict[str, Any]:
        fit = options.get("fit", {})
        more = steps * int(fit.get("steps", cls.Config().fit.steps))
        return {**options, "fit": {**fit, "steps": more}}

    def reschedule(self, **changes: Any) -> None:
        self.config = replace(self.config, fit=replace(self.config.fit, **changes))


def _value(cls: type[BaseAttack], default: Any, key: str, value: Any) -> Any:
    """A nested mapping, as in a YAML file, changes the nested defaults."""
    inner = getattr(default, key)
    if not (isinstance(value, Mapping) and is_dataclass(inner)):
        return value
    known = [f.name for f in fields(inner)]
    for name in value:
        if name not in known:
            raise ValueError(
                f"attack {cls.name!r} has no option {key}.{name}; {key} has: {', '.join(known)}"
            )
    return replace(inner, **value)  # type: ignore[type-var]


_REGISTRY: dict[str, type[BaseAttack]] = {}
BROKEN: dict[str, str] = {}
"""Plugins that cannot be used: entry point to the reason, in one line."""
_PLUGINS = "lcguard.attacks"
_loaded: set[str] = set()
A = TypeVar("A", bound=type[BaseAttack])


def register(name: str) -> Callable[[A], A]:
    """Class decorator: makes an attack known by name. Refuses one without metadata."""

    def wrap(cls: A) -> A:
        if not cls.__module__.startswith("lcguard."):
            _load_built_in()  # first, so that nobody is before them in taking their names
        if not (cls.goal and cls.reference):
            raise ValueError(f"attack {name!r} must state its goal and reference")
        if name in _REGISTRY and _REGISTRY[name] is not cls:
            raise ValueError(f"attack name {name!r} is taken by {_REGISTRY[name].__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return wrap


def _load_built_in() -> None:
    """Every file beside this one: an attack is known by its file alone."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        import_module(f"lcguard.attacks.{file.stem}")


def load_all() -> None:
    """Imports the built-in attacks and those of the ``lcguard.attacks`` entry-point group.

    A plugin that fails leaves nothing behind but a line in ``BROKEN``: it must not keep the
    other attacks from running.
    """
    _load_built_in()
    for entry in entry_points(group=_PLUGINS):
        label = f"{entry.name} = {entry.value}"
        if label in _loaded:
            continue
        _loaded.add(label)
        before = dict(_REGISTRY)
        try:
            entry.load()
        except Exception as error:  # whatever a stranger's module raises
            _REGISTRY.clear()
            _REGISTRY.update(before)
            BROKEN[label] = " ".join(f"{type(error).__name__}: {error}".split())
            continue
        package = entry.module.partition(".")[0]
        if not any(c.__module__.partition(".")[0] == package for c in _REGISTRY.values()):
            BROKEN[label] = "registers no attack; decorate its class with @register(NAME)"


def attack_class(name: str) -> type[BaseAttack]:
    """Raises ``ValueError`` naming the registered attacks."""
    load_all()
    if name not in _REGISTRY:
        broken = "".join(f"; plugin {label} is broken: {why}" for label, why in BROKEN.items())
        raise ValueError(unknown("attack", name, names()) + broken)
    return _REGISTRY[name]


def names() -> list[str]:
    load_all()
    return sorted(_REGISTRY)
