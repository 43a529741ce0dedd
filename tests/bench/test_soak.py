"""The soak's own promises: it runs, and says what is broken when something is."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import pytest

from bench import lives
from bench.ledger import Ledger, Series
from bench.soak import Soak, simulated
from statemachine import CreationFailed, FdPassing, NamespaceRequest, NamespaceResponse
from tests.support.programs import ROOT, environment
from transport.contract import Backend
from transport.descriptors import DescriptorBundle
from transport.testing.gated_backend import GatedBackend

SOAK: Final = "import sys; from bench.soak import main; sys.exit(main(sys.argv[1:]))"
SHORT_S: Final = 2.0
HASTY_S: Final = 0.2
TIMEOUT_S: Final = 110.0


def soak(*words: str, program: str = SOAK, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *words, "--seed", "7"]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env=environment(**variables),
    )


# --- Nothing is broken -------------------------------------------------------------------------


@pytest.mark.deep("long")
@pytest.mark.needs_root
def test_basic_a_short_soak_holds() -> None:
    ran = soak("--minutes", "0.15", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert min(report[part]["hand_overs"] for part in ("real", "simulated")) > 0
    assert report["real"]["done"]["SIGKILL to the provider"] > 0
    assert report["simulated"]["fates"].keys() >= {"emptied", "message"}
    assert any("of 200,000 real" in missed for missed in report["not_reached"])


def test_the_first_line_says_what_was_not_reached() -> None:
    ran = soak("--minutes", "0.02", "--simulated", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("not reached: 0 of 200,000 real hand-overs; ")
    assert "--seed 7" in ran.stdout.splitlines()[-1]


OFTEN_CRASHING: Final = f"""
import json
from bench import lives
from bench.soak import simulated
lives.STEPS_TO_CRASH = 8
print(json.dumps(simulated({SHORT_S}, 7)))
"""


@pytest.mark.deep("long")
def test_a_program_that_dies_while_it_starts_is_started_again() -> None:
    # In another process: what crashes leaves its descriptors open.
    report = json.loads(soak(program=OFTEN_CRASHING).stdout)
    assert report["broken"] == []
    assert report["done"]["crashes of the provider"] > report["fates"]["message"]


# --- Something is broken -----------------------------------------------------------------------

LEAKING: Final = f"""
import subprocess
from bench.lives import RealPlace
leave = RealPlace.leave
def leave_one_more(self, name, process):
    subprocess.Popen(["sleep", "infinity"])
    leave(self, name, process)
RealPlace.leave = leave_one_more
{SOAK}
"""


@pytest.mark.deep("long")
@pytest.mark.needs_root
def test_a_process_that_is_left_is_found() -> None:
    words = ("--minutes", "0.05", "--simulated", "0")
    ran = soak(*words, program=LEAKING, NSHANDOFF_DEADLINE_S="3")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "BROKEN: left: process" in ran.stdout


DYING: Final = f"""
import sys
from tests.support import programs
begin = programs.Daemon.begin
def begin_once(self, **more):
    programs.Daemon.begin = begin
    self.options = (*self.options, "--no-such-option")
    begin(self, **more)
    self.options = self.options[:-1]
programs.Daemon.begin = begin_once
{SOAK}
"""


@pytest.mark.needs_root
def test_a_provider_that_is_gone_is_said_with_what_was_counted() -> None:
    ran = soak("--minutes", "0.05", "--simulated", "0", program=DYING)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "BROKEN: the soak could not go on: AssertionError" in ran.stdout
    assert "--seed 7" in ran.stderr


class Swapping(GatedBackend):
    """Hands over the namespaces of another allocation to the second request."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._asked: set[str] = set()

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        bundle = super().bundle_of(allocation_id)
        if not is_chosen(allocation_id) or allocation_id not in self._asked:
            self._asked.add(allocation_id)
            return bundle
        bundle.close()
        name = f"another-{allocation_id}"
        with suppress(CreationFailed):
            self.backend.create_namespaces(NamespaceRequest(name, bundle.types))
        return super().bundle_of(name)


class Keeping(GatedBackend):
    """Says that something is released which is not."""

    def release_namespaces(self, allocation_id: str) -> None:
        if not is_chosen(allocation_id):
            super().release_namespaces(allocation_id)


def is_chosen(allocation_id: str) -> bool:
    return allocation_id.endswith("3")


class Blind(GatedBackend):
    """Sees nothing end."""

    def observe(self) -> list[Any]:
        self.backend.observe()
        return []


class Slow(GatedBackend):
    """Takes longer than a consumer waits."""

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        if is_chosen(request.allocation_id):
            time.sleep(2 * HASTY_S)
        return super().create_namespaces(request)


class Scarce(GatedBackend):
    """Has no descriptors for some, ever."""

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        if is_chosen(allocation_id):
            raise FdPassing("no descriptor is left")
        return super().bundle_of(allocation_id)


class Leaking(GatedBackend):
    """Opens a descriptor too many with every response."""

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        LEAKED.append(open(os.devnull, "rb"))  # noqa: SIM115  that is the leak
        return super().bundle_of(allocation_id)


LEAKED: Final[list[BinaryIO]] = []


# What a broken provider loses is not closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (Swapping, "wrong namespace"),
        (Keeping, "left on the node"),
        (Blind, "does not end"),
        (Slow, "unanswered for longer"),
        (Scarce, "unanswered: FdPassing"),
        (Leaking, "descriptors: "),
    ],
)
def test_a_fault_of_the_provider_is_found(
    fault: type[GatedBackend], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a haste that is not needed would be a fault of its own.
    if fault in (Keeping, Blind, Slow):
        monkeypatch.setattr(lives, "ANSWER_TIMEOUT_S", HASTY_S)
    try:
        broken = simulated(SHORT_S, 7, fault)["broken"]
    finally:
        while LEAKED:
            LEAKED.pop().close()
    assert any(found in what for what in broken), broken


@pytest.mark.parametrize("line", [b'{"level": "error", "event": "failed"}', b"Traceback"])
def test_what_the_provider_complains_of_is_found(tmp_path: Path, line: bytes) -> None:
    soak = Soak(tmp_path, tmp_path, 7)
    soak._hear_log(b'{"level": "info", "event": "ready"}')
    soak._hear_log(b'{"level": "warning", "event": "limits_lowered"}')
    assert soak.ledger.broken == []
    soak._hear_log(line)
    assert len(soak.ledger.broken) == 1


SoakEvents = list[tuple[Any, ...]]
PID, NET = "Pid:(1,)", "Net:(2,)"


def asked(name: str, *kinds: str) -> tuple[Any, ...]:
    return ("asked", name, 1, (name, list(kinds), None))


@pytest.mark.parametrize(
    ("story", "found"),
    [
        ([asked("a", "Pid"), ("got", "a", [NET], None)], "asked for ['Pid'], got ['Net']"),
        (
            [
                *(asked("a", "Pid"), ("got", "a", [PID], None)),
                *(asked("b", "Pid"), ("got", "b", [PID], None)),
            ],
            "is that of a",
        ),
        ([asked("a", "Pid"), ("got", "a", [PID], None), ("again", "a", [NET])], "it is ('Pid"),
        (
            [
                *(asked("a", "Pid"), ("got", "a", [PID], None)),
                *(("ending", "a", "message"), ("over", "a", None)),
                *(asked("a", "Pid"), ("got", "a", [PID], None)),
            ],
            "had ended",
        ),
        ([asked("a"), asked("a")], "not over"),
        ([asked("a")], "nothing became of it"),
        ([("broken", "a", "unanswered")], "unanswered"),
    ],
)
def test_what_a_report_breaks_is_said(story: SoakEvents, found: str) -> None:
    ledger = Ledger()
    for report in story:
        ledger.take(*report)
    ledger.close()
    assert any(found in what for what in ledger.broken), ledger.broken


def test_a_life_in_order_breaks_nothing() -> None:
    ledger = Ledger()
    for identity in (PID, "Pid:(3,)"):
        ledger.take(*asked("a", "Pid"))
        ledger.take("got", "a", [identity], 1.0)
        ledger.take("again", "a", [identity])
        ledger.take("ending", "a", "message")
        ledger.take("over", "a", 1.0)
    ledger.close()
    assert (ledger.broken, ledger.hand_overs, ledger.fates) == ([], 4, {"message": 2})


# --- Flat or not -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value_at", "verdict"),
    [
        (lambda fraction, noise: 100 + noise, "flat"),
        (lambda fraction, noise: 100 + noise + 50 * fraction, "not flat"),
        (lambda fraction, noise: 100 + 60 * noise, "not decided"),
    ],
)
def test_the_verdict_on_a_series(value_at: Callable[[float, float], float], verdict: str) -> None:
    rng, series = random.Random(1), Series()
    for number in range(1000):
        fraction = number / 1000
        series.add(fraction, value_at(fraction, rng.uniform(-1.5, 1.5)))
    compared = series.compared(rng)
    assert compared is not None
    assert compared["verdict"] == verdict, compared


def test_a_series_of_which_a_tenth_is_missing_is_not_compared() -> None:
    series = Series()
    for number in range(500):
        series.add(number / 1000, 1.0)
    assert series.compared(random.Random(1)) is None
