"""The verification campaign: every part of it, task by task, and a page to look at in the end.

    nshandoff verify [--hours H | --scale S] [--jobs N] [--seed N] [--part NAME]...
                     [--output DIR] [--fresh]

A *part* is a module `*_campaign.py` (what it has to offer is written in `outcome.py`). Its tasks
run in processes of their own, and what each has to show is written down at once: a campaign that
was interrupted goes on where it was, with the same seed, as long as the sources are the same. All
of it ends in `DIR/report.html` and in the exit code: 1 if anything was found.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from linux.cli.exits import SIGNAL_BASE, ExitCode, Interrupted, print_error  # noqa: E402
from tests.campaign.outcome import Task  # noqa: E402
from tests.campaign.report import report  # noqa: E402
from tests.campaign.report_goals import goals_of, is_good  # noqa: E402
from tests.campaign.report_opening import opening_of  # noqa: E402
from tests.campaign.report_summary import Summary, plain, summary_of, text_table  # noqa: E402
from tests.campaign.verify_pool import Pool, PoolTask, failure_of  # noqa: E402
from tests.campaign.verify_progress import Progress, clock  # noqa: E402
from tests.campaign.verify_record import (  # noqa: E402
    Busy,
    CampaignRecord,
    Head,
    environment,
    fingerprint,
    fresh_seed,
    seed_of,
)

TASK_TIMEOUT_S: Final = 900.0
"""How long a task may take at scale 1, unless its part says `timeout_s`."""
REDRAW_S: Final = 0.25
DEFAULT_OUTPUT: Final = ".verify"

SCALE_PER_HOUR: Final = 3.0
"""At scale 1 all parts together take some five minutes: no round is more than a quarter of it."""


def main(words: list[str] | None = None) -> int:
    options = _parse(words)
    try:
        record = CampaignRecord(options.output)
        try:
            return _campaign(options, record)
        finally:
            record.close()
    except (Busy, OSError) as error:
        print_error(f"{type(error).__name__}: {error}")
        return ExitCode.ENVIRONMENT


def parts_of(folder: Path) -> list[str]:
    """List the parts there are."""
    return sorted(path.name.removesuffix("_campaign.py") for path in folder.glob("*_campaign.py"))


def _parse(words: list[str] | None) -> argparse.Namespace:
    parts = parts_of(Path(__file__).parent)
    parser = argparse.ArgumentParser(prog="nshandoff verify", allow_abbrev=False)
    parser.add_argument("--hours", metavar="H", type=_positive)
    parser.add_argument("--scale", metavar="S", type=_positive, default=1.0)
    # One more than cores, because tasks also wait: for processes to die, for deadlines.
    jobs = len(os.sched_getaffinity(0)) + 1
    parser.add_argument("--jobs", metavar="N", type=_count, default=jobs)
    parser.add_argument("--seed", metavar="N", type=int)
    parser.add_argument("--part", metavar="NAME", action="append", choices=parts)
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path(DEFAULT_OUTPUT))
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(words)
    options.part = sorted(set(options.part or parts))
    return options


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError
    return number


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def _campaign(options: argparse.Namespace, record: CampaignRecord) -> int:
    _begin(options, record)
    assert record.head is not None
    progress = Progress(sys.stderr)
    progress.note(f"seed {record.head.seed}, sources {record.head.fingerprint}")
    stop = _Stop()
    campaign = Campaign(record, progress, stop, Pool(options.jobs, record.directory))
    interruption = None
    try:
        for number, scale in _rounds(options, progress):
            if not campaign.go_round(number, scale, options.part):
                break
    except Interrupted as error:
        interruption = error
    finally:
        campaign.end()
    summary = summary_of(record.done.values())
    not_run = [part for part in parts_of(Path(__file__).parent) if part not in summary.parts]
    page = record.directory / "report.html"
    page.write_text(report(record.head, summary, not_run), encoding="utf-8")
    _show(summary, not_run)
    print(f"\n{page.resolve()}")
    if interruption is not None:
        print_error("interrupted; the same command goes on where it was")
        return SIGNAL_BASE + interruption.number
    if fingerprint() != record.head.fingerprint:
        print_error("the sources changed while it ran: what is written there is of no one tree")
        return ExitCode.NO
    return ExitCode.OK if is_good(summary) else ExitCode.NO


def _show(summary: Summary, not_run: list[str]) -> None:
    """Print what is missing, what there is to show, and what of it was to be reached."""
    opening = opening_of(summary, not_run)
    print(*(said for said in (opening.missing, opening.found) if said), sep="\n", end="\n\n")
    for part in summary.parts.values():
        found = f"{len(part.found)} found" if part.found else "nothing found"
        print(f"{part.name}: {part.tasks} tasks, {clock(part.seconds)}, {found}")
        for name, count in part.figures.items():
            print(f"    {plain(count):>12}  {name}")
    goals = [
        (goal.verdict.value, goal.figure, goal.goal, goal.reached) for goal in goals_of(summary)
    ]
    print()
    print(*text_table(("verdict", "figure", "goal", "reached"), goals), sep="\n")
    for found in summary.found:
        print(f"\nFOUND {found.part}: {found.discovery.title} (seed {found.seed})")
        print(found.discovery.script)


def _begin(options: argparse.Namespace, record: CampaignRecord) -> None:
    """Go on with the campaign that is written down, or begin another and say why."""
    before, sources = record.head, fingerprint()
    if before is not None:
        if options.fresh:
            before = None
        elif before.fingerprint != sources:
            print_error("the sources have changed: starting anew")
            before = None
        elif options.seed not in (None, before.seed):
            print_error(f"what is there has seed {before.seed}: starting anew")
            before = None
        elif record.done:
            print_error(f"{len(record.done)} tasks are done already; --fresh starts anew")
    if before is None:
        seed = fresh_seed() if options.seed is None else options.seed
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        record.begin(Head(sources, seed, started, environment()))


def _rounds(options: argparse.Namespace, progress: Progress) -> Iterator[tuple[int, float]]:
    """Count rounds and how large each is: one, or ever larger ones until the time is up."""
    if options.hours is None:
        yield 0, options.scale
        return
    number = 0
    while progress.elapsed_s < options.hours * 3600:
        yield number, min(2.0**number, SCALE_PER_HOUR * options.hours)
        number += 1


class _Stop:
    """Takes note of the signals that ask to stop; what is being done is brought to an end first."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def check(self) -> None:
        """Go on, or raise `Interrupted` if a signal came."""
        if self.number:
            raise Interrupted(self.number)

    def _note(self, number: int, frame: object) -> None:
        self.number = number


class Campaign:
    """Has tasks done, and what they have to show written down; `stop` may end it at any time."""

    def __init__(self, record: CampaignRecord, progress: Progress, stop: _Stop, pool: Pool) -> None:
        self._record = record
        self._progress = progress
        self._stop = stop
        self._pool = pool

    def go_round(self, number: int, scale: float, parts: list[str]) -> int:
        """Do what is not done yet, return how many tasks there are; raises `Interrupted`."""
        jobs = [job for part in parts for job in self._jobs_of(part, number, scale)]
        # First those that go one at a time, so that they do not all come last; then the long ones,
        # so that none goes on by itself at the end.
        jobs.sort(key=lambda job: (not job.is_alone, not job.task.is_long))
        waiting = deque(job for job in jobs if job.key not in self._record.done)
        self._progress.total += len(waiting)
        while waiting or self._pool.jobs:
            self._stop.check()
            for job in list(waiting):
                if self._pool.has_room_for(job):
                    waiting.remove(job)
                    self._pool.start(job)
            for job, outcome in self._pool.wait(REDRAW_S):
                self._record.add(job, outcome)
                self._progress.finished(job, outcome)
            self._progress.draw(self._pool.jobs)
        return len(jobs)

    def end(self) -> None:
        """End what is running; it is not done."""
        self._pool.stop()
        self._progress.clear()

    def _jobs_of(self, part: str, number: int, scale: float) -> list[PoolTask]:
        """List the work of a part; one that cannot say what its work is has found itself."""
        assert self._record.head is not None
        seed = self._record.head.seed
        try:
            module = importlib.import_module(f"tests.campaign.{part}_campaign")
            tasks = module.tasks(scale)
        except Exception as error:
            job = PoolTask(part, Task("tasks"), number, seed, is_alone=False, timeout_s=0.0)
            outcome = failure_of(job, f"cannot be listed: {error!r}", [])
            self._record.add(job, outcome)
            self._progress.finished(job, outcome)
            return [job]
        is_alone = getattr(module, "alone", False)
        timeout_s = getattr(module, "timeout_s", TASK_TIMEOUT_S) * max(1.0, scale)
        return [
            PoolTask(
                part, task, number, seed_of(seed, number, part, task.name), is_alone, timeout_s
            )
            for task in tasks
        ]


if __name__ == "__main__":
    sys.exit(main())
