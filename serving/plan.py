"""Which tensors a study calls for: rules over what its series are of, decided without I/O, and told with reasons."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal

import msgspec

from cache.attributes import Attributes, Described
from cache.errors import ConfigError
from cache.keys import TensorRef, check_name

_DAY: Final = 86400.0
#: What a rule that is not written, ``arrivals.warm``, is called.
DEFAULT: Final = "arrivals.warm"

_Urgency = Annotated[int, msgspec.Meta(ge=1, le=1000)]
_Days = Annotated[float, msgspec.Meta(ge=0)]


class PriorsRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Earlier studies of the patient that a study calls for.

    studies: how many of them, the latest first.
    within_days: no older than so many days before the study; 0 for no limit.
    same: what a series has in common with the one that calls for it.
    recipes: what is made of them; unless it is set, what the rule makes of the study itself.
    priority: as the rule's own: a higher number comes later.
    """

    studies: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    within_days: _Days = 0.0
    same: tuple[Literal["modality", "body_part", "description", "frame_of_reference"], ...] = ("modality",)
    recipes: tuple[str, ...] = ()
    priority: _Urgency = 50


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is made of series that meet all of its conditions; a rule without conditions meets every series.

    name: what `voxcache explain` calls it.
    modality: one of these.
    body_part: one of these; capitals do not matter.
    description: a regular expression found in the series description; capitals do not matter.
    station: one of these.
    min_slices: at least so many.
    max_slices: at most so many; 0 for no limit.
    max_age_days: the study was made at most so many days ago; 0 for no limit.
    recipes: what is made, of tensors and embeddings; none means that nothing is.
    namespace: whose the entries are; unless it is set, arrivals.namespace.
    priority: from 1 to 1000; lower goes first, requests before all of them.
    priors: earlier studies of the patient that are made ready too.
    """

    name: str
    modality: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    description: str = ""
    station: tuple[str, ...] = ()
    min_slices: int = 0
    max_slices: int = 0
    max_age_days: _Days = 0.0
    recipes: tuple[str, ...] = ()
    namespace: str = ""
    priority: _Urgency = 10
    priors: PriorsRule | None = None


class PlanSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is made ready of series that arrive, or that are asked for as a whole.

    rules: the first one that a series meets decides; for those that meet none, arrivals.warm does.
    """

    rules: tuple[Rule, ...] = ()


class Fill(msgspec.Struct, frozen=True):
    """One entry to make, how urgently (lower goes first), and why."""

    want: TensorRef
    priority: int
    why: str


class Passed(msgspec.Struct, frozen=True):
    """A rule that a series does not meet, and the condition that fails."""

    rule: str
    why: str


class Decision(msgspec.Struct, frozen=True):
    """What one series calls for: the rule that decided, those passed over before it, and what is to be made."""

    series: Described
    rule: str
    passed: tuple[Passed, ...]
    fills: tuple[Fill, ...]
    priors: tuple[Fill, ...]


def checked(settings: PlanSettings, recipes: Iterable[str], namespaces: Iterable[str]) -> None:
    """Raises: ConfigError: a rule that cannot work."""
    recipes, namespaces = set(recipes), set(namespaces)
    names = [rule.name for rule in settings.rules]
    for rule in settings.rules:
        where = f"plan.rules: {rule.name!r}"
        if not rule.name or names.count(rule.name) > 1 or rule.name == DEFAULT:
            raise ConfigError(f"{where} needs a name of its own")
        try:
            re.compile(rule.description)
        except re.error as error:
            raise ConfigError(f"{where}: description is no regular expression: {error}") from None
        asked = (*rule.recipes, *(rule.priors.recipes if rule.priors is not None else ()))
        if strange := sorted(set(asked) - recipes):
            raise ConfigError(f"{where} names the recipe {strange[0]!r}, which is not there")
        if rule.namespace and rule.namespace not in namespaces:
            raise ConfigError(f"{where} names the namespace {rule.namespace!r}, which is not there")


def default_rule(recipes: Sequence[str], namespace: str) -> Rule:
    """The rule for what no other one meets: these recipes of every series."""
    return Rule(DEFAULT, recipes=tuple(recipes), namespace=check_name(namespace, "namespace"))


def plan(
    study: Iterable[Described], earlier: Sequence[Described], rules: Sequence[Rule], default: Rule, now: float
) -> list[Decision]:
    """What each series of ``study`` calls for at ``now`` (Unix seconds). Pure.

    ``earlier``: what is known of other studies of the patient. Each entry is planned once, by the first series that
    calls for it.
    """
    planned: set[TensorRef] = set()
    decisions = []
    for series in study:
        rule, passed = _first_met(series, rules, default, now)
        namespace = rule.namespace or default.namespace
        fills = [
            Fill(TensorRef(series.ref, recipe, namespace), rule.priority, f"rule {rule.name}")
            for recipe in rule.recipes
        ]
        decisions.append(
            Decision(
                series=series,
                rule=rule.name,
                passed=passed,
                fills=_once(fills, planned),
                priors=_once(_priors(series, earlier, rule, namespace), planned),
            )
        )
    return decisions


def _first_met(series: Described, rules: Sequence[Rule], default: Rule, now: float) -> tuple[Rule, tuple[Passed, ...]]:
    passed: list[Passed] = []
    for rule in rules:
        why = _unmet(rule, series, now)
        if why is None:
            return rule, tuple(passed)
        passed.append(Passed(rule.name, why))
    return default, tuple(passed)


def _unmet(rule: Rule, series: Described, now: float) -> str | None:
    """The first condition of ``rule`` that the series does not meet; None if it meets all."""
    its = series.attributes or Attributes()
    age_s = now - its.taken_at
    upper = {part.upper() for part in rule.body_part}
    conditions = (
        (not rule.modality or its.modality in rule.modality, f"modality {_shown(its.modality)}"),
        (not upper or its.body_part.upper() in upper, f"body part {_shown(its.body_part)}"),
        (
            not rule.description or re.search(rule.description, its.description, re.IGNORECASE) is not None,
            f"description {_shown(its.description)}",
        ),
        (not rule.station or its.station in rule.station, f"station {_shown(its.station)}"),
        (series.slices >= rule.min_slices, f"{series.slices} slices, fewer than {rule.min_slices}"),
        (not rule.max_slices or series.slices <= rule.max_slices, f"{series.slices} slices, over {rule.max_slices}"),
        (
            not rule.max_age_days or (its.taken_at > 0 and age_s <= rule.max_age_days * _DAY),
            f"{_days(age_s)} old" if its.taken_at > 0 else "its date is unknown",
        ),
    )
    return next((why for met, why in conditions if not met), None)


def _priors(series: Described, earlier: Sequence[Described], rule: Rule, namespace: str) -> list[Fill]:
    """The entries of the patient's earlier studies that ``rule`` calls for."""
    its, wanted = series.attributes, rule.priors
    if wanted is None or its is None or not its.patient:
        return []

    def belongs(other: Described) -> bool:
        theirs = other.attributes
        return (
            theirs is not None
            and theirs.patient == its.patient
            and other.ref.study != series.ref.study
            and 0 < theirs.taken_at < its.taken_at
            and (not wanted.within_days or its.taken_at - theirs.taken_at <= wanted.within_days * _DAY)
            and all(getattr(theirs, name) == getattr(its, name) != "" for name in wanted.same)
        )

    found = sorted(filter(belongs, earlier), key=lambda other: (-_taken_at(other), other.ref))
    studies = list(dict.fromkeys(other.ref.study for other in found))[: wanted.studies]
    return [
        Fill(
            TensorRef(other.ref, recipe, namespace),
            wanted.priority,
            f"rule {rule.name}: prior of {series.ref.study}, {_days(its.taken_at - _taken_at(other))} before",
        )
        for other in found
        if other.ref.study in studies
        for recipe in wanted.recipes or rule.recipes
    ]


def _taken_at(series: Described) -> float:
    return series.attributes.taken_at if series.attributes is not None else 0.0


def _once(fills: Iterable[Fill], planned: set[TensorRef]) -> tuple[Fill, ...]:
    """Those that were not planned before; they are from now on."""
    new = []
    for fill in fills:
        if fill.want not in planned:
            planned.add(fill.want)
            new.append(fill)
    return tuple(new)


def _days(seconds: float) -> str:
    return f"{seconds / _DAY:.0f} days"


def _shown(value: str) -> str:
    return repr(value) if value else "unknown"
