"""`python -m bench`: every figure is there, nothing is left; and the statistics behind it."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import pytest

from bench import peers, results
from bench.children import ChildFailed, results_of
from bench.measures import Taken
from bench.ratios import median_interval, p99, ratio_interval
from tests.support.programs import ROOT, environment
from transport.testing.peer import wait_until

COMMAND: Final = (sys.executable, "-m", "bench")
TIMEOUT_S: Final = 110.0

# --- the whole command -------------------------------------------------------------------------


@pytest.mark.needs_root
def test_basic_every_figure_is_there_and_nothing_is_left(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*COMMAND, "--quick", "--seed", "7", "--out", tmp_path],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env=environment(),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["failed"] == report["left"] == []
    there = [peer.name for peer in peers.all_peers(tmp_path) if peers.is_installed(peer)]
    assert {"unshare", "ip netns"} <= set(there)
    wanted = [(one.name, one.other[1] if one.other else "") for one in results.planned_rows(there)]
    assert [(row["name"], row["against"]) for row in report["rows"]] == wanted
    assert report["processor_us"].keys() == report["alive_us"].keys() == {"ours", "floor"}
    assert ran.stdout.startswith("not measured: ")
    assert (tmp_path / "figures.csv").read_text().startswith("figure,whose,round,value\ncreate,")
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert len(list(tmp_path.glob("*.svg"))) == (3 if drawn else 0)


@pytest.mark.deep("long")
@pytest.mark.needs_root
def test_nothing_is_left_by_an_interruption(tmp_path: Path) -> None:
    variables = environment(TMPDIR=str(tmp_path))
    with subprocess.Popen([*COMMAND, "--out", tmp_path], cwd=ROOT, env=variables) as program:
        wait_until(lambda: bool(list(tmp_path.glob("*/state/ready"))))
        time.sleep(random.uniform(0, 5))
        program.send_signal(signal.SIGINT)
        assert program.wait(TIMEOUT_S) == 130
    assert list(tmp_path.iterdir()) == []


# --- ratios ------------------------------------------------------------------------------------


def noisy(scale: float, rounds: int = 20) -> list[list[float]]:
    rng = random.Random(1)
    return [[scale * rng.uniform(90, 110) for _ in range(10)] for _ in range(rounds)]


def test_a_ratio_is_within_its_interval() -> None:
    found = ratio_interval(noisy(2.0), noisy(1.0), random.Random(7))
    assert found.value == pytest.approx(2.0)
    assert 1.9 < found.low <= found.value <= found.high < 2.1


def test_the_same_seed_gives_the_same_interval() -> None:
    first, again = (ratio_interval(noisy(2.0), noisy(1.0), random.Random(7)) for _ in range(2))
    assert first == again


def test_what_slows_both_sides_of_a_round_does_not_widen_the_interval() -> None:
    slowed = [[value * (1 + number) for value in [100.0] * 9] for number in range(10)]
    doubled = [[2 * value for value in values] for values in slowed]
    found = ratio_interval(doubled, slowed, random.Random(7))
    assert found == (2.0, 2.0, 2.0)


def test_one_round_has_an_interval_too() -> None:
    found = ratio_interval(noisy(3.0, 1), noisy(1.0, 1), random.Random(7))
    assert found.low < found.value < found.high


def test_a_round_that_only_one_side_has_does_not_count() -> None:
    found = ratio_interval([[4.0], [1.0]], [[2.0]], random.Random(7))
    assert found == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(("ours", "other"), [([], [[1.0]]), ([[1.0]], []), ([[]], [[1.0]])])
def test_nothing_measured_is_no_ratio(ours: list[list[float]], other: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        ratio_interval(ours, other, random.Random(7))


def test_a_median_has_an_interval_by_itself() -> None:
    assert median_interval([[3.0, 4.0, 5.0]] * 3, random.Random(7)).value == 4.0


def test_the_99th_percentile() -> None:
    assert (p99([5.0]), p99([float(number) for number in range(101)])) == (5.0, 99.0)


# --- rows and their text -----------------------------------------------------------------------


def taken_of(**figures: tuple[float, float]) -> Taken:
    taken = Taken()
    for name, sides in figures.items():
        for whose, value in zip(("ours", "floor"), sides, strict=True):
            taken.add(name, whose, [value])
    return taken


def row_of(taken: Taken, name: str, *there: str) -> results.BenchRow:
    rows, _ = results.rows_of(taken, list(there), 7)
    return next(row for row in rows if row.name == name)


@pytest.mark.parametrize(("ours", "verdict"), [(15.0, "reached"), (15.1, "NOT reached")])
def test_a_goal_is_reached_or_not(ours: float, verdict: str) -> None:
    row = row_of(taken_of(create=(ours, 10.0)), "create")
    assert (row.ratio, row.goal, row.verdict) == (ours / 10, "<= 1.5", verdict)


def test_beside_a_peer_it_is_said_how_many_times_faster_ours_is() -> None:
    taken = Taken()
    taken.add("life", "ours", [10.0])
    taken.add("life", "crun", [90.0])
    assert row_of(taken, "life", "crun").ratio == 9.0
    assert row_of(taken, "life", "crun").verdict == "reached"


def test_what_is_missing_is_named() -> None:
    rows, missing = results.rows_of(taken_of(create=(1.0, 1.0)), ["bwrap"], 7)
    assert [row.name for row in rows] == ["create"]
    assert "life against bwrap: nothing was measured" in missing


def test_all_at_once_are_compared_with_the_sustained_rate() -> None:
    taken = Taken()
    taken.add("sustained, a second", "ours", [100.0])
    taken.add("at once, s", "ours", [20.0])
    taken.add("at once, served", "ours", [999.0])
    results.add_derived(taken, 1000)
    assert row_of(taken, "at once, s").ratio == 2.0
    assert row_of(taken, "at once, unserved").verdict == "NOT reached"


def report_of(taken: Taken) -> dict[str, Any]:
    rows, missing = results.rows_of(taken, [], 7)
    machine = {"processor": "P", "kernel": "K", "python": "3", "cores": [0], "all_cores": 1}
    return {
        "not_measured": ["podman (not installed)", *missing],
        "machine": {**machine, "load_before": [0.5], "load_after": [1.5], "other_work": True},
        "settings": {"rounds_done": 1, "seed": 7, "many": 1000},
        "rows": results.as_plain(rows),
        "processor_us": {},
        "alive_us": {},
        "left": ["process 1"],
    }


def test_the_text_begins_with_what_is_missing_and_ends_with_what_is_left() -> None:
    lines = results.text_of(report_of(taken_of(create=(30.0, 10.0))), None).splitlines()
    assert lines[0].startswith("not measured: podman (not installed); release against floor")
    assert lines[-1] == "LEFT: process 1"


def test_the_change_of_a_ratio_is_said() -> None:
    former = report_of(taken_of(create=(40.0, 10.0)))
    text = results.text_of(report_of(taken_of(create=(30.0, 10.0))), former)
    assert "4.00 (-25%)" in text


# --- processes ---------------------------------------------------------------------------------


def test_processes_give_their_results_in_order() -> None:
    assert results_of(lambda: 1, lambda: [2.5], lambda: {"a": 3}) == [1, [2.5], {"a": 3}]


def test_what_a_process_raises_is_said_and_the_others_end() -> None:
    def fail() -> int:
        raise LookupError("no such thing")

    def wait() -> int:
        time.sleep(1000)
        return 0

    with pytest.raises(ChildFailed, match="LookupError: no such thing"):
        results_of(fail, wait)


def test_a_process_that_dies_is_noticed() -> None:
    with pytest.raises(ChildFailed, match="died without a word"):
        results_of(lambda: os.kill(os.getpid(), signal.SIGKILL))
