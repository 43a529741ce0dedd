"""Do many random lives change anything? `python bench/soak.py`, as root; two minutes.

A provider that runs as a program has a crew of consumers, each a process that leads several lives
at a time, one random step after the other: every order of every subset of the namespaces, with and
without an image, asked for again, ended by message or by the last process of the scope, and the
same name once more. Beside them consumers are killed and replaced, and a process floods or sends
garbage. In the second part the provider is killed and started again, too. Afterwards the same lives
are led on a simulated node, in one process, with crashes at random steps.

Verified are the namespaces of every hand-over (by identity), the fate of every allocation, that
every request is answered, and that nothing is left. What breaks ends in exit code 1. A seed repeats
all choices, but not when the Linux kernel runs whom.

Memory, descriptors, threads and times are compared, the last tenth with the first: each is "flat"
if the 95 % interval of their ratio ends below 1.05, "not flat" if it begins above, and otherwise
"not decided". The interval is a bootstrap's of ten blocks of time a tenth.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from bench.fairness import FLOODS, OTHER, STRANGER, start
from bench.isolated import in_isolation
from bench.ledger import Ledger, LedgerEntry, process_figures
from bench.lives import CLAIM_S, Crew, RealPlace, SimulatedPlace
from linux.features import Features
from linux.simulated import SimulatedCrash
from linux.testing.worlds import IMAGE, OTHER_IMAGE
from statemachine import (
    AllocationNotFound,
    FdPassing,
    NamespaceRequest,
    NamespaceType,
    SocketUnavailable,
)
from tests.support.programs import Daemon
from transport.contract import Backend
from transport.request.exchange import ANSWER_TIMEOUT_S
from transport.testing.gated_backend import GatedBackend
from transport.testing.peer import Line, frame_of

REAL_GOAL: Final = 200_000
SIMULATED_GOAL: Final = 1_000_000
"""Hand-overs of an hour that say enough."""

SIMULATED_SHARE: Final = 0.25
STEADY_SHARE: Final = 0.6
"""The part of the real time in which the provider is not killed, so that its memory can be seen."""

CREW: Final = 3
SAMPLE_S: Final = 0.25
CONSUMER_LIVES_S: Final = 4.0
PROVIDER_LIVES_S: Final = 3.0
FLOOD_S: Final = (0.3, 1.5)
FINISH_S: Final = 120.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="altogether")
    parser.add_argument("--simulated", type=float, default=SIMULATED_SHARE, help="share of them")
    parser.add_argument("--seed", type=int, default=None, help="repeats the choices of a run")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    seconds = options.minutes * 60
    logging.disable(logging.WARNING)  # of consumers whose provider is killed
    report: dict[str, Any] = {
        "replay": f"python bench/soak.py --minutes {options.minutes} "
        f"--simulated {options.simulated} --seed {seed}"
    }
    print(report["replay"], file=sys.stderr)  # also if it comes to no report
    if options.simulated < 1:
        report["real"] = real(seconds * (1 - options.simulated), seed)
    if options.simulated > 0:
        report["simulated"] = simulated(seconds * options.simulated, seed)
    report["not_reached"] = not_reached(report)
    print(json.dumps(report, indent=1) if options.json else text_of(report))
    return 1 if any(report[part]["broken"] for part in PARTS if part in report) else 0


PARTS: Final = {"real": REAL_GOAL, "simulated": SIMULATED_GOAL}


def not_reached(report: dict[str, Any]) -> list[str]:
    missed = []
    for part, goal in PARTS.items():
        found = report.get(part, {"hand_overs": 0, "broken": [], "figures": {}})
        if found["broken"]:
            missed.append(f"{part}: {len(found['broken'])} promises broken")
        if found["hand_overs"] < goal:
            missed.append(f"{found['hand_overs']:,} of {goal:,} {part} hand-overs")
        missed += [
            f"{part} {name}: {figure['verdict']}"
            for name, figure in found["figures"].items()
            if figure["verdict"] != "flat"
        ]
    return missed


def text_of(report: dict[str, Any]) -> str:
    lines = [f"not reached: {'; '.join(report['not_reached']) or 'nothing'}"]
    for part in PARTS:
        if part not in report:
            continue
        found = report[part]
        rate = found["hand_overs"] / found["seconds"]
        lines += ["", f"{part}: {found['hand_overs']:,} hand-overs verified, {rate:,.0f} a second"]
        lines += [f"  {name}: {counts_of(found[name])}" for name in COUNTS if name in found]
        for name, figure in found["figures"].items():
            lines.append(
                f"  {name:20}{figure['first']:12,.3f} to {figure['last']:12,.3f}"
                f"   x {figure['ratio']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
                f"   {figure['verdict']}"
            )
        lines += [f"  BROKEN: {what}" for what in found["broken"]]
    return "\n".join([*lines, "", f"the same choices again: {report['replay']}"])


COUNTS: Final = ("fates", "refusals", "done", "warnings")


def counts_of(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "none"


def simulated(
    seconds: float, seed: int, wrap: Callable[[Backend], Any] = GatedBackend
) -> dict[str, Any]:
    """Lead lives on a simulated node for some time, and say how it went."""
    rng = random.Random(f"{seed} simulated")
    ledger, done = Ledger(), Counter[str]()
    before = process_figures("self")["descriptors"]
    place = SimulatedPlace(rng, wrap)
    crew = Crew(0, seed, place, ledger.take)
    started = sampled = time.monotonic()
    ends = started + seconds
    try:
        while (now := time.monotonic()) < ends:
            ledger.fraction = (now - started) / seconds
            if now - sampled > SAMPLE_S:
                sampled = now
                for name, value in process_figures("self").items():
                    ledger.measure(name, value)
            for _ in range(20):
                crew.step()
            place.be_hostile(rng)
            place.backend.tidy()
            done["hostile connections"] += 1
        ledger.fraction = None
        crew.finish()
        place.crash_no_more()
        for number in range(4):
            with suppress(AllocationNotFound):
                place.consumer().end(f"hostile-{number}", ANSWER_TIMEOUT_S)
    except (AssertionError, FdPassing, SocketUnavailable, SimulatedCrash) as error:
        ledger.breaks(f"unanswered: {error!r}")
    ledger.close()
    left = {*place.node.allocations, *place.node.journal}
    if left:
        ledger.breaks(f"left on the node: {sorted(left)}")
    done["crashes of the provider"] = place.crashes
    place.stop()
    place.node.close()
    gc.collect()  # a program that crashed has its descriptors for as long as its traceback
    if (after := process_figures("self")["descriptors"]) > before and not ledger.broken:
        ledger.breaks(f"descriptors: {before:.0f} before, {after:.0f} after")
    return {**ledger.outcome(time.monotonic() - started, rng), "done": dict(done)}


# --- Real ----------------------------------------------------------------------------------------


def garbage(path: Path, number: int) -> None:
    """Send frames that are none, and descriptors that no provider takes."""
    rng = random.Random(f"{number} {os.getpid()} {time.monotonic_ns()}")
    frame = bytearray(frame_of(NamespaceRequest(f"garbage-{number}", (NamespaceType.NET,))))
    for _ in range(rng.randrange(4)):
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    with suppress(AssertionError, FdPassing), Line.to(path) as line:
        line.sock.settimeout(0.2)
        line.say(bytes(frame[: rng.randrange(1, len(frame) + 1)]), [0] * rng.randrange(3))
        line.hear()


HOSTILE: Final = {**FLOODS, "garbage": garbage}
FLOOD_PREFIXES: Final = ("again-", "storm-", "unread-", "garbage-")
"""How the names of their allocations begin."""


def real(seconds: float, seed: int) -> dict[str, Any]:
    """Run the real part, and count before and after."""
    outcome: dict[str, Any] = {}

    def lead(folder: Path, cgroup2: Path) -> None:
        outcome.update(Soak(folder, cgroup2, seed).run(seconds))

    left = in_isolation(lead)
    outcome["broken"] += [f"left: {line}" for line in left]
    return outcome


class Soak:
    """
    A provider, its crew, and what happens to them.

    Args:
        folder: its own.
        cgroup2: where cgroup v2 is mounted.
        seed: of all choices.
    """

    def __init__(self, folder: Path, cgroup2: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._rng = random.Random(f"{seed} real")
        features = Features.probe()
        is_unique = features.namespace_ids and features.mount_namespace_ids
        self.ledger = Ledger(is_unique)
        self.done: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        options = ("--mode", "0666", "--allow-uid", str(OTHER), "--claim-timeout", str(CLAIM_S))
        self._daemon = Daemon(folder, folder / "images", *options)
        self._place = RealPlace(self._daemon.socket, cgroup2)
        self._crew: dict[int, int] = {}
        """The members, by process."""
        self._members = 0
        self._flood: int | None = None
        self._is_stopping = False
        self._ends: tuple[signal.Signals, ...] = (signal.SIGKILL,)
        self._reports: Pipes
        self._log: Pipes

    def run(self, seconds: float) -> dict[str, Any]:
        started = time.monotonic()
        make_images(self._folder)
        try:
            self._lead(seconds)
        except Exception as error:
            # What was counted until then is told all the same.
            self.ledger.breaks(f"the soak could not go on: {error!r}")
        self.ledger.close()
        outcome = self.ledger.outcome(time.monotonic() - started, self._rng)
        return {**outcome, "done": dict(self.done), "warnings": dict(self._warnings)}

    def _lead(self, seconds: float) -> None:
        with ExitStack() as stack:
            self._reports, self._log = (stack.enter_context(Pipes()) for _ in range(2))
            stack.callback(self._kill_all)
            self._daemon.stderr = self._log.write_end
            self._daemon.begin()
            self._await(self._is_ready, "the provider is ready")
            for _ in range(CREW):
                self._start_member()
            steady = {
                self._kill_member: CONSUMER_LIVES_S,
                self._turn_hostile: FLOOD_S[0],
                self._sample: SAMPLE_S,
            }
            self._go_on(seconds * STEADY_SHARE, steady, is_measured=True)
            crashes = {
                self._kill_member: CONSUMER_LIVES_S,
                self._turn_hostile: FLOOD_S[0],
                self._kill_provider: PROVIDER_LIVES_S,
            }
            self._kill_provider()
            self._go_on(seconds * (1 - STEADY_SHARE), crashes)
            self._finish()

    def _go_on(
        self, seconds: float, works: dict[Callable[[], float], float], is_measured: bool = False
    ) -> None:
        """Let time pass, in which each piece of work is done when it is due, and says when next."""
        started = time.monotonic()
        due = {
            work: started + self._rng.uniform(0, min(first_s, seconds / 4))
            for work, first_s in works.items()
        }
        while (passed := time.monotonic() - started) < seconds:
            # What fills at first (memory of names, pools) is no growth.
            self.ledger.fraction = (passed / seconds - WARM) / (1 - WARM) if is_measured else None
            if self.ledger.fraction is not None and self.ledger.fraction < 0:
                self.ledger.fraction = None
            self._listen()
            for work in works:
                if time.monotonic() >= due[work]:
                    due[work] = time.monotonic() + work()
        self.ledger.fraction = None

    def _finish(self) -> None:
        """Let everything come to its end, as it may."""
        self._end_flood()
        self._is_stopping = True
        for pid in self._crew:
            os.kill(pid, signal.SIGTERM)
        self._await(lambda: not self._crew, "the crew finishes")
        self._await(self._is_ready, "the provider is ready")
        # What floods have left, which has no consumer to end it.
        left = self._daemon.alive()
        self.done["allocations that floods left"] = len(left)
        for name in left:
            with suppress(AllocationNotFound):
                self._place.consumer().end(name)
            self._listen(0)
        self._await(lambda: not self._daemon.alive(), "nothing is in the journal")
        status = self._daemon.stop()
        if status:
            self.ledger.breaks(f"the provider stopped with status {status}")
        self._listen(0)

    def _kill_all(self) -> None:
        """End the processes that are left when something failed."""
        self._end_flood()
        for pid in self._crew:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if self._daemon.program is not None:
            # Its log is not read any more.
            if self._daemon.program.poll() is None:
                self._daemon.stop(signal.SIGKILL)
            self._daemon.stderr = None
            self._daemon.clear()
            self._daemon.stop()

    # What is heard.

    def _await(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + FINISH_S
        while not happened():
            self._listen()
            if time.monotonic() > deadline:
                raise TimeoutError(f"it did not come true that {what}; {self.ledger.broken}")

    def _is_ready(self) -> bool:
        return self._daemon._is_ready()

    def _listen(self, wait_s: float = 0.02) -> None:
        """Take the reports and the log that have come, and replace consumers that have died."""
        select.select([self._reports.read_end, self._log.read_end], [], [], wait_s)
        for line in self._log.lines():
            self._hear_log(line)
        # A consumer that is dead now has said all that it will, so it is looked for first.
        dead = [member for member in self._crew if os.waitid(os.P_PID, member, _LOOK) is not None]
        for line in self._reports.lines():
            self.ledger.take(*json.loads(line))
        for pid in dead:
            self._replace(pid)

    def _hear_log(self, line: bytes) -> None:
        if b'"level": "info"' in line:
            return
        try:
            said = json.loads(line)
        except ValueError:
            self.ledger.breaks(f"the provider: {line.decode(errors='replace')}")
            return
        if said["level"] == "warning":
            self._warnings[said["event"]] += 1
        else:
            self.ledger.breaks(f"the provider: {line.decode()}")

    # The crew.

    def _start_member(self, heir_of: int = 0) -> None:
        self._members += 1
        member = self._members
        orphans = self.ledger.inherit(heir_of, member)
        pid = os.fork()
        if pid:
            self._crew[pid] = member
            return
        status = 1
        try:
            self._be_member(member, orphans)
            status = 0
        except BaseException as error:
            self._reports.say("broken", f"consumer {member}", repr(error))
        finally:
            os._exit(status)

    def _be_member(self, member: int, orphans: list[tuple[str, LedgerEntry]]) -> None:
        told: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
        crew = Crew(member, self._seed, self._place, self._reports.say)
        for name, entry in orphans:
            crew.take_over(name, entry.request, entry.state)
        while not told and not self._is_stopping:
            crew.step()
        crew.finish()

    def _kill_member(self) -> float:
        os.kill(self._rng.choice(list(self._crew)), signal.SIGKILL)
        self.done["kills of consumers"] += 1
        return self._rng.expovariate(1 / CONSUMER_LIVES_S)

    def _replace(self, pid: int) -> None:
        """Have another consumer go on with what a dead one had."""
        os.waitpid(pid, 0)
        member = self._crew.pop(pid)
        if not self._is_stopping or self.ledger.has_any(member):
            self._start_member(heir_of=member)

    # What happens to them.

    def _sample(self) -> float:
        for name, value in process_figures(self._daemon.pid).items():
            self.ledger.measure(name, value)
        return SAMPLE_S

    def _kill_provider(self) -> float:
        """Kill it or have it stop, and start it again; the first time it is killed."""
        if not self._is_ready():
            return SAMPLE_S
        number = self._rng.choice(self._ends)
        self._ends = (*[signal.SIGKILL] * 4, signal.SIGTERM)
        self._daemon.stop(number)
        self._daemon.begin()
        self.done[f"{number.name} to the provider"] += 1
        return self._rng.expovariate(1 / PROVIDER_LIVES_S)

    def _turn_hostile(self) -> float:
        """Begin a flood, or end the one there is."""
        if self._flood is None:
            name, number = self._rng.choice(list(HOSTILE)), self._rng.randrange(4)
            uid = STRANGER if name == "strangers" else self._rng.choice((None, OTHER))
            work, path = HOSTILE[name], self._daemon.socket
            self._flood = start(lambda: work(path, number), uid)
            self.done[f"times {name}"] += 1
        else:
            self._end_flood()
            self._end_allocations_of_floods()
        return self._rng.uniform(*FLOOD_S)

    def _end_allocations_of_floods(self) -> None:
        """End what a flood was killed with: it would live on, and be taken for a leak."""
        for name in self._daemon.alive():
            if name.startswith(FLOOD_PREFIXES):
                with suppress(AllocationNotFound, SocketUnavailable):  # a provider may be dead
                    self._place.consumer().end(name, ANSWER_TIMEOUT_S)
                self.done["allocations of floods ended"] += 1

    def _end_flood(self) -> None:
        if self._flood is not None:
            os.kill(self._flood, signal.SIGKILL)
            os.waitpid(self._flood, 0)
            self._flood = None


WARM: Final = 0.1
"""The part of the time after which figures are taken."""

_LOOK: Final = os.WEXITED | os.WNOHANG | os.WNOWAIT


class Pipes:
    """A pipe of lines that several processes may write; each line is written at once."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
        self._rest = b""

    def say(self, *what: Any) -> None:
        os.write(self.write_end, json.dumps(what).encode()[: select.PIPE_BUF - 1] + b"\n")

    def lines(self) -> Iterable[bytes]:
        """Read what is there by now."""
        with suppress(BlockingIOError):
            while data := os.read(self.read_end, 1 << 16):
                *lines, self._rest = (self._rest + data).split(b"\n")
                yield from lines

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


def make_images(folder: Path) -> None:
    """Make the images that lives have."""
    tree = folder / "tree"
    tree.mkdir()
    (tree / "hello.txt").write_text("hello\n")
    for image in (IMAGE, OTHER_IMAGE):
        path = folder / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mksquashfs", tree, path, "-noappend", "-no-progress", "-quiet"],
            check=True,
            stdout=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    sys.exit(main())
