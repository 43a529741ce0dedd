"""Who catches what is counted, and what is said of a layer follows from it."""

from __future__ import annotations

import pytest

from tests.campaign import catches_campaign
from tests.campaign.canaries_tree import CanaryResult
from tests.campaign.catches_campaign import BUGS, LAYERS, SLOW
from tests.campaign.report_catches import NOTHING, by_bug, by_layer, idle, markdown, uncaught
from tests.campaign.report_goals import GoalStatus, goals_of
from tests.campaign.report_summary import Part, Summary


def row(bug: str, layer: str, caught: str) -> dict[str, str]:
    return {"bug": bug, "layer": layer, "caught": caught, "seconds": "1.0", "finding": ""}


ROWS = [
    row("late", "explorer", "yes"),
    row("late", "stateful machine", "yes"),
    row("lost", "explorer", "no"),
    row("lost", "stateful machine", "yes"),
    row("odd", "explorer", "no"),
]


def test_basic_of_a_layer_is_said_how_many_it_catches_and_which_no_other_does() -> None:
    explorer, machine = by_layer(ROWS)
    assert (explorer["catches"], explorer["alone"]) == ("1 of 3", "0")
    assert explorer["what only it catches"] == NOTHING
    assert (machine["catches"], machine["what only it catches"]) == ("2 of 2", "lost")
    assert idle(ROWS) == ["explorer"]
    assert uncaught(ROWS) == ["odd"]


def test_of_a_bug_is_said_who_catches_it_and_who_was_not_asked() -> None:
    late, _, odd = by_bug(ROWS)
    assert late == {"bug": "late", "explorer": "caught", "stateful machine": "caught"}
    assert odd == {"bug": "odd", "explorer": "-", "stateful machine": ""}
    assert markdown([late]).splitlines()[0] == "| bug | explorer | stateful machine |"


def test_goals_name_an_idle_layer_and_a_bug_that_no_layer_catches() -> None:
    goals = {g.figure: g for g in goals_of(Summary({"catches": Part("catches", rows=ROWS)}))}
    machine = goals["planted bugs that the stateful machine catches"]
    assert (machine.reached, machine.verdict) == ("2 of 2", GoalStatus.REACHED)
    assert goals["layers that catch nothing which another does not"].reached == "explorer"
    assert goals["planted bugs that no layer catches"].reached == "odd"


def test_the_whole_table_has_every_layer_on_every_bug_and_a_small_one_takes_no_slow_layer() -> None:
    whole, small = catches_campaign.tasks(20.0), catches_campaign.tasks(1.0)
    assert len(whole) == len({t.name for t in whole}) == len(LAYERS) * (len(BUGS) + 1)
    assert 0 < len(small) <= 80
    assert not [task for task in small if task.arguments["layer"] in SLOW]
    assert catches_campaign.tasks(0.25) == []


def test_what_no_table_can_be_imported_with_counts_for_no_layer() -> None:
    outcome = catches_campaign.run(
        0, "explorer", "an end does not take back the request that waits for the release"
    )
    assert not outcome.rows
    assert not outcome.discoveries


@pytest.mark.parametrize(("finding", "is_found"), [(None, False), ("it failed", True)])
def test_a_layer_that_finds_something_where_nothing_is_wrong_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, finding: str | None, is_found: bool
) -> None:
    layer = type(LAYERS[0])
    monkeypatch.setattr(layer, "run", lambda *_: CanaryResult(finding, 1.0))
    clean = catches_campaign.run(0, LAYERS[0].name, "")
    assert bool(clean.discoveries) == is_found
    assert clean.rows == []
    shown = catches_campaign.run(0, LAYERS[0].name, BUGS[0].name)
    assert not shown.discoveries
    assert shown.rows[0]["caught"] == ("yes" if is_found else "no")


def test_a_bug_that_a_layer_is_there_for_is_caught_in_the_table() -> None:
    outcome = catches_campaign.run(0, "explorer", "answers leave as soon as they are known")
    assert outcome.rows[0]["caught"] == "yes"
    outcome = catches_campaign.run(0, "explorer", "the length of a frame is little-endian")
    assert outcome.rows[0]["caught"] == "no"
