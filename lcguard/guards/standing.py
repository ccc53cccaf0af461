"""What was measured of a guard, and by what name whoever serves one unmeasured has to say so.

A guard that was trained for three steps loads like one that was trained for hours. Its card knows
the difference: a certificate that says something, or an evaluation on held-out records.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lcguard.guards.frozen import Card, GuardError, read_card

SPEAKS_AGAINST = {
    "leaks": "its evaluation says that it leaks",
    "not measured": "its evaluation measured too little to judge by",
}
"""By an evaluation's verdict."""


ENOUGH = 0.25
"""A certificate speaks for a guard where no attacker names a secret more often than this."""


def unproven(card: Card) -> str:
    """Why nothing speaks for the guard; empty where something does: a certificate whose ceiling is
    ``ENOUGH`` or less, or an evaluation on held-out records whose verdict is not that it leaks."""
    evaluation = card.evaluation or {}
    if against := SPEAKS_AGAINST.get(evaluation.get("verdict", "")):
        return against
    certificate = card.certificate or {}
    ceiling = float(certificate.get("asr_ceiling", 1.0))
    if evaluation or (certificate and not certificate["vacuous"] and ceiling <= ENOUGH):
        return ""
    if certificate and not certificate["vacuous"]:
        return (
            f"its certificate leaves an attacker {ceiling:.1%} of the secrets, and its card has no "
            "evaluation on held-out records"
        )
    if certificate:
        return (
            f"its certificate of {float(certificate['mean_nats']):,.4g} nats is vacuous, and its "
            "card has no evaluation on held-out records"
        )
    return "its card has neither a certificate nor an evaluation on held-out records"


def unproven_guards(guards: Mapping[str, str]) -> dict[str, str]:
    """Guard as policies call it -> why nothing speaks for it, for those of which that is so.

    Folders that cannot be read are left to those who load them.
    """
    out = {}
    for name, path in guards.items():
        try:
            why = unproven(read_card(path))
        except (GuardError, ValueError):
            continue
        if why:
            out[name] = why
    return out


def check_proven(guards: Mapping[str, str], accepted: Collection[str], option: str) -> None:
    """Raises ``GuardError`` for an unproven guard that is not ``accepted`` by name.

    ``option``: how it is accepted, with ``{}`` for the name.
    """
    for name, why in unproven_guards(guards).items():
        if name not in accepted:
            raise GuardError(
                f"guards.{name}: nothing shows that it withholds anything: {why}. Measure it "
                "(lcguard eval run, then lcguard eval record), or serve it as it is with "
                f"{option.format(name)}"
            )
