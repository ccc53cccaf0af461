"""Puts the rooms together for an evaluation: model, data, guards, attacks.

Only this package and the command line know core, agents and attacks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.load import load_hops, split_hops
from lcguard.agents.scenarios.schema import sample_value
from lcguard.agents.scenarios.types import Hop
from lcguard.attacks.base import Knowledge, attack_class
from lcguard.attacks.decoder import DecoderAttack
from lcguard.categories import CATEGORIES
from lcguard.config import load_config
from lcguard.evaluation.answers import VALUE_ONLY
from lcguard.evaluation.folder import RunFolder, RunJournal, data_digest
from lcguard.evaluation.fresh_attacks import check_fresh, check_headline
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.outcomes import Journal, Outcome
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig, GuardSpec
from lcguard.evaluation.report import write_report
from lcguard.evaluation.runner import AttackFactory, Runner, Setup
from lcguard.evaluation.summary import run_all
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.guards.erasure import ErasureGuard
from lcguard.guards.shipped import guard_folder
from lcguard.protocols import Attack
from lcguard.records import TokenRecord
from lcguard.training.fit_erasure import fit_erasure

T = TypeVar("T")
PRESETS = Path(__file__).parent.parent / "agents" / "nano" / "presets"


def preset(name: str) -> Path:
    """A configuration shipped with the nano agent. Raises ``ValueError`` naming those there are."""
    path = PRESETS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"preset {name!r} is unknown; shipped: {known}")
    return path


def load_plan(
    schema: type[T], config: str | Path, sets: Sequence[str], data: Path | None, prefix: str = ""
) -> T:
    """A configuration from a YAML file, or from the preset ``prefix + config``, with overrides."""
    path = Path(config) if Path(config).suffix else preset(f"{prefix}{config}")
    return load_config(schema, path, [*sets, *([f"data.path={data}"] if data else [])])


def load_guard(spec: GuardSpec, backend: HFBackend) -> FrozenGuard:
    """A guard that fits the backend's model and revision; anything else is refused."""
    if bool(spec.guard) == bool(spec.path):
        raise ValueError(f"guard {spec.name!r}: give either guard (a name) or path, not both")
    if spec.path:
        return FrozenGuard.from_pretrained(
            guard_folder(spec.path), model_digest=backend.digest, shape=backend.source.shape
        )
    cls = guard_class(spec.guard)
    if cls.trained:
        raise ValueError(f"guard {spec.name!r}: {spec.guard!r} is trained; give path to its folder")
    module = cls.build(KVShape(*backend.source.shape), len(CATEGORIES), dict(spec.options))
    return FrozenGuard(module)


def fit_plain_guards(
    guards: dict[str, FrozenGuard], backend: HFBackend, records: Sequence[TokenRecord]
) -> None:
    """Channel statistics for guards without weights of their own: Gaussian noise is per channel.
    Erasers, on their own or as a part, learn their concepts from the records."""
    plain = [g for g in guards.values() if not g.module.trained]
    if plain:
        raw = backend.source.prefill([r.ids for r in records[:256]])
        for guard in plain:
            if any(isinstance(part, ErasureGuard) for part in guard.module.modules()):
                fit_erasure(guard.module, records, backend.source)
            guard.module.fit_statistics(raw)


def attack_factory(backend: HFBackend, broken_at: float | None) -> AttackFactory:
    """Builds attacks from specs; ``broken_at`` ends the fitting of one that has already won."""

    def make(
        spec: AttackSpec, warm: Attack | None, early: bool, guard: FrozenGuard | None
    ) -> Attack:
        cls = attack_class(spec.attack)
        options: dict[str, Any] = dict(spec.options)
        fit = options.pop("fit", None)
        attack = cls.build(options)
        if fit is not None or early:
            config: Any = attack.config
            if hasattr(config, "fit"):
                changes = {**(fit or {}), **({"stop_at": 0.97} if early and broken_at else {})}
                attack.config = replace(config, fit=replace(config.fit, **changes))
        if isinstance(attack, DecoderAttack) and isinstance(warm, DecoderAttack):
            attack.warm = warm
        attack.equip(
            Knowledge(backend.source, backend.decode, guard, backend.encoder.prompt,
                      backend.encoder.ids, sample_value)
        )  # fmt: skip
        return attack

    return make


def hops_for(data: DataConfig) -> tuple[list[Hop], list[Hop]]:
    """Attackers' and victims' hops; no scenario is in both."""
    if data.source == "generator":
        # coined names: attackers and guards have to read tokens, not to recognise names
        wanted = (
            ("coined", data.train_records, data.seed),
            ("test", data.test_records, data.seed + 1),
        )
        train, test = (
            load_hops(
                "generator",
                path=None,
                seed=seed,
                split=split,
                n=n,
                min_fields=data.min_fields,
                max_fields=data.max_fields,
            )[:n]
            for split, n, seed in wanted
        )
        return train, test
    path = Path(data.path) if data.path else None
    hops = load_hops(
        data.source,
        path=path,
        seed=data.seed,
        split="test",
        n=None,
        min_fields=data.min_fields,
        max_fields=data.max_fields,
    )
    share = data.train_records / (data.train_records + data.test_records)
    train, test = split_hops(hops, share, data.seed)
    return train[: data.train_records], test[: data.test_records]


def setup(config: EvalConfig, say: Callable[[str], None], device: str | None = None) -> Setup:
    """Loads everything a run needs. Raises ``ValueError`` in one line for anything missing."""
    backend = load_backend(config.model, device)
    guards = {g.name: load_guard(g, backend) for g in config.guards}
    encoder = backend.encoder.asking(VALUE_ONLY) if config.by_reply else backend.encoder
    train, test = (encoder.encode(hops) for hops in hops_for(config.data))
    if not train or not test:
        raise ValueError(
            f"{config.data.source}: {len(train)} train and {len(test)} test records; "
            "both must be above 0"
        )
    fit_plain_guards(guards, backend, train)
    return Setup(
        config,
        backend.source,
        backend.special,
        backend.decode,
        train,
        test,
        guards,
        attack_factory(backend, config.broken_at),
        "said" if config.by_reply else "exact",
        say,
    )


def evaluate(
    config: EvalConfig,
    out: Path,
    command: str,
    say: Callable[[str], None] = lambda text: None,
    device: str | None = None,
    progress: Callable[[int], None] = lambda units: None,
) -> dict[str, Any]:
    """Runs or resumes an evaluation in ``out`` and writes its report there.

    ``progress`` is told how many units the journal holds. Raises ``ValueError`` where ``out``
    holds a run with another configuration.
    """
    folder = RunFolder(out)
    folder.check(config)  # before the model is loaded
    check_fresh(config)
    made = setup(config, say, device)
    now = run_manifest(command, list(config.seeds), config)
    guards = {name: guard.digest for name, guard in made.guards.items()}
    now["hashes"] |= {"data": data_digest(made.train, made.test), "guards": guards}
    manifest = folder.start(config, now)
    made.timing.update(folder.timing())

    def after() -> None:
        nonlocal manifest
        manifest = folder.resumed(now)
        folder.save_timing(made.timing)
        progress(len(journal))

    with RunJournal(folder.journal_file, after) as journal:
        progress(len(journal))
        report = report_of(made, journal, manifest=lambda: manifest)
    write_report(report, out)
    return report


def report_of(
    made: Setup, journal: Journal, manifest: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The report of a run; what its journal lacks is done now."""
    config = made.config
    figures = run_all(Runner(made, journal))
    attempts = journal.attempts()
    check_headline(figures["results"], attempts, config)
    errors = sum(a.outcome is Outcome.ERROR for a in attempts)
    over = errors > config.error_budget
    where = manifest()
    sources = {m["hashes"]["source"] for m in [where, *where.get("resumed", [])]}
    warnings = [OVER.format(errors, config.error_budget)] if over else []
    warnings += [CHANGED] if len(sources) > 1 else []
    return {
        "title": config.title,
        **where,
        "model": {"name": config.model, "shape": list(made.source.shape)},
        "data": {
            "source": config.data.source,
            "train_records": len(made.train),
            "test_records": len(made.test),
            "secrets": sum(len(r.secrets()) for r in made.test),
            "task_questions": sum(q.task for r in made.test for q in r.questions),
        },
        "journal": {"units": len(journal), "attempts": len(attempts)},
        "errors": {"attempts": errors, "budget": config.error_budget, "exceeded": over},
        **figures,
        "notes": [*warnings, *NOTES],
    }


OVER = (
    "{} attempts ended in an error, and the budget is {}: they count for nobody, so the figures "
    "below rest on fewer attempts than were made. Repair the attack and run again."
)
CHANGED = (
    "This run was interrupted and went on with other code of lcguard: some units are of the one "
    "and some of the other (the manifest has both hashes)."
)
NOTES = (
    "Fresh ASR: attackers fitted from scratch after the guard was frozen, on guarded segments of "
    "their own records, knowing the guard; the best of them, mean over categories, exact match.",
    "Training-time ASR is what the attacker that a guard was trained against recovers in the end. "
    "It is not a privacy figure; it stands here to show how far it can lie.",
    "Floor: the same attack fitted and scored on segments of other records. Ceiling: on raw KV.",
    "Utility: share of task questions answered exactly, greedy decoding, from the segment alone.",
)
