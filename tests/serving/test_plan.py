"""The first rule that a series meets decides; earlier studies come after; every decision says why."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.attributes import Attributes, Described
from cache.errors import ConfigError
from cache.keys import SeriesRef, TensorRef
from serving.plan import DEFAULT, Decision, PlanSettings, PriorsRule, Rule, checked, default_rule, plan

DAY = 86400.0
NOW = 20_000 * DAY
NOTHING = default_rule((), "serving")


def series(study: str = "1.2", number: int = 1, objects: int = 300, days_ago: float = 1.0, **changes: Any) -> Described:
    """A chest CT of patient "a"."""
    base: dict[str, Any] = {
        "patient": "a",
        "modality": "CT",
        "body_part": "CHEST",
        "description": "Lung 1.0 B60f",
        "station": "CT01",
        "taken_at": NOW - days_ago * DAY,
    }
    return Described(SeriesRef(study, f"{study}.{number}"), objects, Attributes(**(base | changes)))


def decide(one: Described, *rules: Rule, earlier: list[Described] | None = None) -> Decision:
    (decision,) = plan([one], earlier or [], rules, NOTHING, NOW)
    return decision


def wants(decision: Decision) -> list[tuple[str, str, int]]:
    return [(f.want.ref.series, f.want.recipe, f.priority) for f in (*decision.fills, *decision.priors)]


LUNG = Rule("lung", modality=("CT",), description="lung", min_slices=100, recipes=("lung", "embed"), priority=5)


def test_the_first_rule_that_is_met_decides() -> None:
    """Those before it are told with the condition that failed; those behind it are not looked at."""
    first = Rule("mr", modality=("MR",), recipes=("brain",))
    last = Rule("rest", recipes=("volume",))
    decision = decide(series(), first, LUNG, last)
    assert decision.rule == "lung"
    assert [(passed.rule, passed.why) for passed in decision.passed] == [("mr", "modality 'CT'")]
    assert wants(decision) == [("1.2.1", "lung", 5), ("1.2.1", "embed", 5)]
    assert {fill.why for fill in decision.fills} == {"rule lung"}


@pytest.mark.parametrize(
    ("rule", "changes", "why"),
    [
        ({"modality": ("MR", "PT")}, {}, "modality 'CT'"),
        ({"modality": ("MR",)}, {"modality": ""}, "modality unknown"),
        ({"body_part": ("head",)}, {}, "body part 'CHEST'"),
        ({"description": "^b60"}, {}, "description 'Lung 1.0 B60f'"),
        ({"station": ("CT02",)}, {}, "station 'CT01'"),
        ({"min_slices": 301}, {}, "300 slices, fewer than 301"),
        ({"max_slices": 299}, {}, "300 slices, over 299"),
        ({"max_slices": 599}, {"frames": 2}, "600 slices, over 599"),
        ({"max_age_days": 0.5}, {}, "1 days old"),
        ({"max_age_days": 9}, {"taken_at": 0.0}, "its date is unknown"),
    ],
)
def test_each_condition(rule: dict[str, Any], changes: dict[str, Any], why: str) -> None:
    """A condition that is not met is the reason, and met it stands in nobody's way."""
    decision = decide(series(**changes), Rule("r", recipes=("volume",), **rule))
    assert (decision.rule, decision.fills, decision.passed[0].why) == (DEFAULT, (), why)


def test_conditions_that_are_met() -> None:
    """All of them together, capitals aside where they do not matter."""
    rule = Rule(
        "r",
        modality=("MR", "CT"),
        body_part=("chest",),
        description=r"b6\df$",
        station=("CT01",),
        min_slices=300,
        max_slices=300,
        max_age_days=1,
        recipes=("volume",),
    )
    assert decide(series(), rule).rule == "r"


def test_a_rule_may_say_nothing_is_made() -> None:
    """It stops what comes behind it, the default included."""
    rules = (Rule("scouts", max_slices=3), LUNG)
    (decision,) = plan([series(objects=2)], [], rules, default_rule(("volume",), "staging"), NOW)
    assert (decision.rule, decision.fills) == ("scouts", ())
    (other,) = plan([series(modality="MR")], [], rules, default_rule(("volume",), "staging"), NOW)
    assert [fill.want for fill in other.fills] == [TensorRef(other.series.ref, "volume", "staging")]
    assert other.fills[0].why == "rule arrivals.warm"


def test_of_what_nothing_is_known() -> None:
    """A series that was never read meets rules without conditions on its attributes only."""
    unknown = Described(SeriesRef("1.2", "1.2.1"), 300, None)
    assert decide(unknown, LUNG, Rule("big", min_slices=200, recipes=("volume",))).rule == "big"


def test_priors() -> None:
    """The latest earlier studies of the patient, of the same kind and age span, come at lower priority."""
    rule = Rule("ct", recipes=("lung",), priority=5, priors=PriorsRule(studies=2, within_days=400, same=("modality",)))
    earlier = [
        series("1.9", days_ago=10),
        series("1.8", days_ago=200),
        series("1.8", 2, days_ago=200),
        series("1.7", days_ago=300),
        series("1.6", days_ago=500),
        series("1.5", days_ago=5, modality="MR"),
        series("1.4", days_ago=5, patient="b"),
        series("1.3", days_ago=0),  # later
        series("1.1", taken_at=0.0),
        Described(SeriesRef("1.0", "1.0.1"), 3, None),
    ]
    decision = decide(series(), rule, earlier=earlier)
    assert wants(decision) == [
        ("1.2.1", "lung", 5),
        ("1.9.1", "lung", 50),
        ("1.8.1", "lung", 50),
        ("1.8.2", "lung", 50),
    ]
    assert decision.priors[0].why == "rule ct: prior of 1.2, 9 days before"


def test_nobodys_studies_are_not_one_persons() -> None:
    """Without a patient there are no priors; what is unknown on both sides is not the same."""
    rule = Rule("ct", recipes=("lung",), priors=PriorsRule(same=("body_part",)))
    assert decide(series(patient=""), rule, earlier=[series("1.9", patient="", days_ago=9)]).priors == ()
    assert decide(series(body_part=""), rule, earlier=[series("1.9", body_part="", days_ago=9)]).priors == ()


def test_priors_may_have_recipes_of_their_own() -> None:
    """What is made of earlier studies need not be what is made of the study."""
    rule = Rule("ct", recipes=("lung",), priors=PriorsRule(recipes=("embed",), priority=70))
    assert wants(decide(series(), rule, earlier=[series("1.9", days_ago=9)])) == [
        ("1.2.1", "lung", 10),
        ("1.9.1", "embed", 70),
    ]


def test_an_entry_is_planned_once() -> None:
    """Two series of a study that call for the same prior have it made once."""
    rule = Rule("ct", recipes=("lung",), priors=PriorsRule())
    decisions = plan([series(), series(number=2)], [series("1.9", days_ago=9)], [rule], NOTHING, NOW)
    assert [len(decision.priors) for decision in decisions] == [1, 0]


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([Rule("", recipes=("volume",))], "name of its own"),
        ([Rule("a"), Rule("a")], "name of its own"),
        ([Rule(DEFAULT)], "name of its own"),
        ([Rule("a", description="(")], "regular expression"),
        ([Rule("a", recipes=("none",))], "'none'"),
        ([Rule("a", priors=PriorsRule(recipes=("none",)))], "'none'"),
        ([Rule("a", namespace="none")], "'none'"),
    ],
)
def test_rules_that_cannot_work(rules: list[Rule], why: str) -> None:
    """They are refused at start, by name."""
    with pytest.raises(ConfigError, match=why):
        checked(PlanSettings(tuple(rules)), ["volume"], ["serving"])
    checked(PlanSettings((Rule("a", recipes=("volume",), namespace="serving"),)), ["volume"], ["serving"])


known = st.builds(
    series,
    study=st.sampled_from(["1.2", "1.3", "1.4", "1.5"]),
    number=st.integers(1, 3),
    objects=st.integers(1, 400),
    days_ago=st.integers(0, 900),
    modality=st.sampled_from(["CT", "MR", ""]),
    patient=st.sampled_from(["a", "b", ""]),
)


@given(st.lists(known, max_size=6), st.lists(known, max_size=12), st.integers(1, 3), st.integers(0, 500))
def test_what_holds_of_every_plan(study: list[Described], earlier: list[Described], studies: int, days: int) -> None:
    """One decision a series, each entry once, and priors only of the same patient, in number and age as allowed."""
    rules = (Rule("ct", modality=("CT",), recipes=("lung",), priors=PriorsRule(studies, float(days))),)
    decisions = plan(study, earlier, rules, default_rule(("volume",), "serving"), NOW)
    assert [decision.series for decision in decisions] == study
    fills = [fill.want for decision in decisions for fill in (*decision.fills, *decision.priors)]
    assert len(fills) == len(set(fills))
    patients = {(other.ref, other.attributes.patient) for other in earlier if other.attributes is not None}
    for decision in decisions:
        its = decision.series.attributes
        assert its is not None
        assert decision.rule == ("ct" if its.modality == "CT" else DEFAULT)
        assert len({fill.want.ref.study for fill in decision.priors}) <= studies
        assert all((fill.want.ref, its.patient) in patients and its.patient for fill in decision.priors)
