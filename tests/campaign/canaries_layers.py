"""The layers of the suite, each with a budget so small that a canary can be shown to all of it.

Each function imports what its layer needs, and returns what is to be run. It raises if the layer
finds anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from statemachine.testing.explore import Bounds

LayerCheck = Callable[[], object]

WALK_STEPS: Final = 4_000
STATEFUL_EXAMPLES: Final = 1_000
"""Most runs of the machine over the kernels; a canary is found in the first few."""


# --- Exhaustive --------------------------------------------------------------------------------


def explorer(space: str) -> LayerCheck:
    """Look at every world of a small space."""
    from statemachine.testing.explore import Explorer

    bounds = _spaces()[space]
    return lambda: Explorer(bounds).explore()


def explorers() -> LayerCheck:
    """Look at every world of each of these spaces."""
    checks = [explorer(space) for space in _spaces()]
    return lambda: [check() for check in checks]


def _spaces() -> Mapping[str, Bounds]:
    from statemachine.testing.explore import Bounds, only

    return {
        "one": Bounds(without=only("want", "end")),
        "a pair": Bounds(consumers=2, without=only("want", "end")),
        "a slow answer": Bounds(without=only("want", "end", "overdue")),
        "a failure": Bounds(faults=1, without=only("want", "end", "fail")),
        "a death": Bounds(faults=1, without=only("want", "die")),
        "a crash": Bounds(crashes=1, without=only("want", "end", "crash")),
        "a crash, asked again": Bounds(consumers=2, crashes=1, without=only("want", "crash")),
        "duplicates": Bounds(faults=2, without=only("want", "init dies", "duplicate")),
    }


def model(table: str, names: str) -> LayerCheck:
    """Lead a kernel and the reference model side by side."""
    from statemachine.testing import lockstep

    if table == "consumer":
        return lockstep.explore_consumer
    return lambda: lockstep.walk_provider(1, names, WALK_STEPS)


def models() -> LayerCheck:
    """Lead both kernels beside the reference model."""
    checks = [model("consumer", ""), model("allocation", "ab")]
    return lambda: [check() for check in checks]


# --- At random ---------------------------------------------------------------------------------


def stateful(seed: int) -> LayerCheck:
    """Let Hypothesis do to two kernels and a link whatever peers and the node may do."""
    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    from tests.suites.test_pair import Pair

    settings = hypothesis.settings(
        max_examples=STATEFUL_EXAMPLES,
        stateful_step_count=40,
        database=None,
        derandomize=False,
        deadline=None,
        # What is asked is whether it is found, and how soon; not what the shortest way to it is.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    seeded: Any = hypothesis.seed(seed)(Pair)
    return lambda: run_state_machine_as_test(seeded, settings=settings)


def machines(kind: str) -> LayerCheck:
    """Do what CI does with a stateful machine, on every adapter; but look for no shortest way."""
    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    _hurry()
    from tests.campaign.stateful_campaign import EXAMPLES, STEPS_OF, TOURS, opened
    from tests.suites.stateful.names import PROCESSES, SHARES
    from tests.suites.stateful.tour import take

    ci = hypothesis.settings.get_profile("ci")
    generate = [hypothesis.Phase.generate]

    def run() -> None:
        for name in EXAMPLES[kind]:
            with opened(name, kind) as machine:
                if name not in PROCESSES:
                    take(machine, TOURS[kind])
                settings = hypothesis.settings(
                    ci,
                    max_examples=round(ci.max_examples * SHARES[name]),
                    stateful_step_count=STEPS_OF[kind],
                    phases=generate,
                )
                run_state_machine_as_test(machine, settings=settings)

    return run


def _hurry() -> None:
    """Do not wait as long for what a bug keeps from coming true as for what a node may delay."""
    os.environ["CI"] = "true"
    os.environ["NSHANDOFF_DEADLINE_S"] = "6"


# --- Tests by name -----------------------------------------------------------------------------


def tests(*selected: str) -> LayerCheck:
    """Run some tests, until the first that fails."""
    arguments = [f"tests/{name}" for name in selected]
    _hurry()
    return lambda: _run_pytest(arguments)


def _run_pytest(arguments: list[str]) -> None:
    first, folder = _FirstFailure(), Path.cwd() / "basetemp"
    options = ["-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", f"--basetemp={folder}"]
    # Hypothesis is imported already, here and in every fork; pytest would make a warning of it.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, *arguments], plugins=[first])
    _remove_anchor_cgroups(folder)
    if status != pytest.ExitCode.OK:
        raise AssertionError(first.account or f"pytest ended with {status!r}")


def _remove_anchor_cgroups(folder: Path) -> None:
    """A test that fails half-way can leave one; it has its name from the provider's directory."""
    from linux.cgroups import CgroupUnavailable, find_cgroup2, remove_anchor_cgroup
    from linux.instance import instance_of

    with suppress(CgroupUnavailable):
        root = find_cgroup2()
        for directory in (path for path in folder.rglob("*") if path.is_dir()):
            remove_anchor_cgroup(root, instance_of(directory))


class _FirstFailure:
    """A plugin that remembers what failed first."""

    def __init__(self) -> None:
        self.account = ""

    def pytest_collection_finish(self) -> None:
        # What others do to this machine meanwhile is no finding about a canary.
        from tests import conftest
        from tests.support import census

        conftest.session_census.overlooked |= frozenset(census.MACHINE_WIDE)

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self.account:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
            self.account = f"{report.nodeid.rpartition('/')[2]}: {why.splitlines()[0]}"

    pytest_collectreport = pytest_runtest_logreport


# --- Strangers ---------------------------------------------------------------------------------


def interference(backend: str, life: str, act: str, where: str = "") -> LayerCheck:
    """Sweep a stranger's act over the calls of a life, until something of anyone's is lost."""
    import tempfile

    from tests.campaign.faults_campaign import StageDir
    from tests.suites.faults.faults import Fault
    from tests.suites.faults.interference import interferences_of
    from tests.suites.faults.lives import ALL_LIVES
    from tests.support.census import Session

    def sweep() -> None:
        Session()
        with (
            tempfile.TemporaryDirectory(prefix="nsh-test-") as directory,
            StageDir(Path(directory)).stage(backend) as stage,
        ):
            told = ALL_LIVES[life]
            faults: list[Fault] = []
            for call in stage.tell(told).passed:
                if call.where.startswith(where):
                    faults += [f for f in interferences_of(call, backend, life) if f.kind == act]
            for fault in faults:
                stage.tell(told, (fault,))

    return sweep
