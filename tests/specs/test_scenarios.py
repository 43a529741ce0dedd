"""Every scenario of `specs/scenarios/` plays as it stands, and every party does what it says there.

`pytest tests/specs/test_scenarios.py --rewrite-scenarios` writes down what the kernels do; the
difference is what there is to review. The daemon must do the same.
"""

from __future__ import annotations

import difflib
import re
from itertools import count
from pathlib import Path

import pytest

from linux.simulated import SimulatedBackend, SimulatedNode
from linux.testing.worlds import MOUNT, NET
from specs._build.clauses import clauses
from statemachine.messages import NamespaceRequest
from tests.specs import scenarios
from tests.specs.scenarios import DAEMON, FOLDER, KERNELS, SCENARIOS, Scenario
from tests.specs.scenarios_accounts import column
from tests.specs.scenarios_stages import PATIENCE_S, Environment, OnDaemon, OnKernels
from tests.support.census import Census

README = (FOLDER / "README.md").read_text(encoding="utf-8")

PROMISED = (
    "a handoff over the socket, descriptors by SCM_RIGHTS",
    "the consumer receives them and enters",
    "no socket: the consumer falls back, with an audit event",
    "the first user mounts the image",
    "the second user shares the mount",
    "a release counts one user less",
    "after the hold time the image is unmounted",
    "used again during the hold time, it is not mounted again",
    "an operator can force an unmount",
    "an empty cgroup is cleaned up",
    "a consumer's crash is cleaned up after",
    "the count of users is right after a restart",
    "orphaned mounts are found and removed",
    "requests before readiness are queued, not refused",
    "a consumer without any provider works",
)
"""What upstream's scenarios of the workload integration promise."""

IN_VAIN_S = 0.5
"""How long to wait for what will not come."""

_ROW = re.compile(r"^\| (?:([^|\[]+) \| )?\[([^\]]+)\]\(([0-9][^)]+)\) \| (.*) \|$", re.MULTILINE)
_LINK = re.compile(r"\[([A-Z]+-\d+)\]\(\.\./([^)]+)\)")


def those_of(player: str) -> list[Path]:
    return [path for path in SCENARIOS if player in Scenario.read(path).players]


def stem(path: Path) -> str:
    return path.stem


def difference(scenario: Scenario, stage: Environment, patience_s: float = PATIENCE_S) -> str:
    """Play a scenario; say where its text is not what was done."""
    played = scenarios.play(scenario, stage, patience_s)
    lines = difflib.unified_diff(
        scenario.text.splitlines(), played.splitlines(), "written", "played", lineterm=""
    )
    return "\n".join(lines)


@pytest.mark.parametrize("path", those_of(KERNELS), ids=stem)
def test_the_kernels_do_what_is_written(path: Path, request: pytest.FixtureRequest) -> None:
    scenario = Scenario.read(path)
    if request.config.getoption("--rewrite-scenarios"):
        path.write_text(scenarios.play(scenario, OnKernels()), encoding="utf-8")
        return

    found = difference(scenario, OnKernels())

    assert not found, f"\n{found}\nto take it over: pytest {__file__} --rewrite-scenarios"


@pytest.fixture
def daemon(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str, census: Census
) -> OnDaemon:
    return OnDaemon(tmp_path, cgroup2, image_root, allocation_id)


@pytest.mark.sample(3)
@pytest.mark.needs_root
@pytest.mark.parametrize("path", those_of(DAEMON), ids=stem)
def test_the_daemon_does_what_is_written(path: Path, daemon: OnDaemon) -> None:
    found = difference(Scenario.read(path), daemon)

    assert not found, f"\n{found}"


# --- The player can fail -----------------------------------------------------------------------


def story(*lines: str) -> Scenario:
    block = "\n".join(lines)
    return Scenario(f"# T\n\nPlayed by the kernels and the daemon.\n\n```scenario\n{block}\n```\n")


@pytest.fixture
def handoff() -> Scenario:
    written = story("> the provider starts", "> first wants job-1: Net Mount")
    return Scenario(scenarios.play(written, OnKernels()))


FALSE = [
    ("2 descriptors", "1 descriptor"),
    ("first                holds job-1: Net Mount, set 1\n", ""),
    ("requested → created", "created → requested"),
    ("node                 job-1", "node                 hello.sqfs: mounted\nnode   job-1"),
]


@pytest.mark.parametrize(("true", "false"), FALSE)
def test_a_line_that_is_false_is_found_out(handoff: Scenario, true: str, false: str) -> None:
    assert true in handoff.text
    written = Scenario(handoff.text.replace(true, false))

    assert difference(handoff, OnKernels()) == ""
    assert difference(written, OnKernels()) != ""


@pytest.mark.needs_root
def test_the_daemon_is_found_out_as_well(handoff: Scenario, daemon: OnDaemon) -> None:
    written = Scenario(handoff.text.replace("+ 2 descriptors", "+ 3 descriptors"))

    assert "+provider → first     NamespaceResponse job-1 Net Mount + 2" in difference(
        written, daemon, IN_VAIN_S
    )


@pytest.mark.needs_root
def test_what_comes_after_all_is_found_out(daemon: OnDaemon) -> None:
    scenario = Scenario.read(FOLDER / "07-hold-time.md")
    written = Scenario(scenario.text.replace("node                 hello.sqfs: nothing left\n", ""))

    assert "+node                 hello.sqfs: nothing left" in difference(
        written, daemon, IN_VAIN_S
    )


def test_what_is_left_on_the_node_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario.read(FOLDER / "07-hold-time.md")
    monkeypatch.setattr(SimulatedBackend, "tidy", lambda self: None)

    assert "-node                 hello.sqfs: nothing left" in difference(scenario, OnKernels())


def test_other_namespaces_are_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario.read(FOLDER / "19-two-consumers.md")
    node, calls, bundle_of = SimulatedNode(), count(), SimulatedBackend.bundle_of
    elsewhere = SimulatedBackend(node)
    for name in ("job-0", "job-1"):
        elsewhere.create_namespaces(NamespaceRequest(name, (NET, MOUNT)))
    monkeypatch.setattr(
        SimulatedBackend,
        "bundle_of",
        lambda self, name: bundle_of(elsewhere if next(calls) else self, name),
    )
    try:
        found = difference(scenario, OnKernels())
    finally:
        elsewhere.close()
        node.close()
    assert "+second               holds job-1: Net Mount, set 2" in found


def test_what_cannot_be_played_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no way to play 'the moon rises'"):
        scenarios.play(story("> the moon rises"), OnKernels())
    with pytest.raises(AssertionError, match="it is not said who plays it"):
        _ = Scenario("# T\n").players
    with pytest.raises(AssertionError, match="no reason"):
        _ = Scenario("Played by the kernels.\n").players
    assert Scenario("Played by the kernels. It takes a week.\n").players == (KERNELS,)


# --- The README says what there is -------------------------------------------------------------


def test_every_promise_has_its_scenario_and_every_scenario_its_row() -> None:
    rows = _ROW.findall(README)

    assert tuple(promise for promise, *_ in rows if promise) == PROMISED
    assert [name for _, _, name, _ in rows] == [path.name for path in SCENARIOS]
    for _, title, name, shown in rows:
        scenario = Scenario.read(FOLDER / name)
        assert scenario.text.startswith(f"# {title}\n")
        assert re.findall(r"\[([A-Z]+-\d+)\]", shown) == scenario.shown


def test_the_example_of_the_readme_is_what_happens() -> None:
    example = re.findall(r"^```text\n(> .*?)^```$", README, re.MULTILINE | re.DOTALL)
    start = "> the provider starts\n" + column("provider", "ready")

    assert len(example) == 1
    assert difference(story(start, example[0].rstrip()), OnKernels()) == ""


@pytest.mark.parametrize("path", [*SCENARIOS, FOLDER / "README.md"], ids=stem)
def test_the_clauses_that_are_shown_exist(path: Path) -> None:
    links = _LINK.findall(path.read_text(encoding="utf-8"))
    known = clauses()

    assert links
    assert all(target == f"{known[name].chapter.name}#{name}" for name, target in links)


@pytest.mark.parametrize("path", SCENARIOS, ids=stem)
def test_a_scenario_has_blocks_of_no_other_kind(path: Path) -> None:
    fences = re.findall(r"^```(.*)$", Scenario.read(path).text, re.MULTILINE)

    assert set(fences) == {"scenario", ""}


def test_every_command_is_explained_and_used() -> None:
    explained = re.findall(r"`([^`]+)`", README.partition("## Commands")[2])
    used = {told for path in SCENARIOS for told in Scenario.read(path).commands}

    for pattern in scenarios.VOCABULARY:
        assert any(re.fullmatch(pattern, told) for told in explained), pattern
        assert any(re.fullmatch(pattern, told) for told in used), pattern
