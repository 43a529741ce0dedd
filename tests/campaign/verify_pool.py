"""Tasks in processes of their own: started, watched, ended, and what became of them.

A task that raises, dies or hangs has found something, if only in itself. It leads a session of its
own, so that a Ctrl-C at the terminal is not its business, and whatever it leaves running in its
process group can be ended with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.campaign.outcome import Discovery, Outcome, Task

ROOT: Final = Path(__file__).parents[2]
LOG_LINES_MAX: Final = 40
"""How much of its log a task that failed is shown with: the end."""
GRACE_S: Final = 10.0
"""How long an interrupted task may tidy up before it is killed."""


@dataclass(frozen=True)
class PoolTask:
    """A task, and how it is to be run."""

    part: str
    task: Task
    round: int
    seed: int
    is_alone: bool
    """Never beside another such: it needs the node for itself."""
    timeout_s: float

    @property
    def key(self) -> str:
        """The same for the same work."""
        arguments = json.dumps(self.task.arguments, sort_keys=True)
        return f"{self.round} {self.part} {self.task.name} {arguments}"

    @property
    def words(self) -> list[str]:
        """The end of the command line that does it."""
        arguments = json.dumps(self.task.arguments, sort_keys=True)
        return [self.part, "--seed", str(self.seed), "--arguments", arguments]

    @property
    def command(self) -> str:
        """What repeats it by hand."""
        return shlex.join(["python", "-m", "tests.campaign.verify_task", *self.words])


class Pool:
    """At most so many tasks at a time; `directory` keeps their logs, but not their outcomes."""

    def __init__(self, jobs_max: int, directory: Path) -> None:
        self._jobs_max = jobs_max
        self._logs = directory / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._running: list[_Process] = []

    @property
    def jobs(self) -> list[PoolTask]:
        """Those that are running."""
        return [process.job for process in self._running]

    def has_room_for(self, job: PoolTask) -> bool:
        """Say whether a job can be started now."""
        is_taken = job.is_alone and any(other.is_alone for other in self.jobs)
        return len(self._running) < self._jobs_max and not is_taken

    def start(self, job: PoolTask) -> None:
        """Start a job for which there is room."""
        self._running.append(_Process(job, self._logs))

    def wait(self, timeout_s: float) -> Iterator[tuple[PoolTask, Outcome]]:
        """Wait for one that ends, and take what has; those that hang are ended."""
        poll = select.poll()
        for process in self._running:
            poll.register(process.pidfd, select.POLLIN)
        over = {number for number, _ in poll.poll(timeout_s * 1000)}
        for process in list(self._running):
            if process.pidfd in over:
                self._running.remove(process)
                yield process.job, process.finish()
            else:
                process.press()

    def stop(self) -> None:
        """End all that run, their process groups as well; what they have found is lost."""
        for process in self._running:
            process.interrupt()
        while self._running:
            for _ in self.wait(0.1):
                pass


def file_name_of(name: str) -> str:
    """Make a file's name of a task's: as readable as is possible, and no other task has it."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    readable = re.sub(r"[^\w.-]+", "-", name)[:100]
    return f"{readable}-{digest}"


class _Process:
    """One task's process; it must be finished, which also takes it off the system's table."""

    def __init__(self, job: PoolTask, logs: Path) -> None:
        self.job = job
        name = file_name_of(f"{job.round}-{job.part}-{job.task.name}")
        self._log = logs / f"{name}.log"
        self._outcome = logs / f"{name}.json"
        self._outcome.unlink(missing_ok=True)
        self._started = time.monotonic()
        self._interrupted: float | None = None
        self._is_hanging = False
        # Under CI Hypothesis would take the same examples every time, whatever the seed.
        environment = {name: value for name, value in os.environ.items() if name != "CI"}
        own = ["--outcome", str(self._outcome), "--parent", str(os.getpid())]
        with self._log.open("wb") as log:
            self._program = subprocess.Popen(
                [sys.executable, "-m", "tests.campaign.verify_task", *job.words, *own],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        self.pidfd = os.pidfd_open(self._program.pid)

    def press(self) -> None:
        """Interrupt it when its time is up, and kill it when that does not help."""
        now = time.monotonic()
        if self._interrupted is None:
            if now - self._started > self.job.timeout_s:
                self._is_hanging = True
                self.interrupt()
        elif now - self._interrupted > GRACE_S:
            self._signal_group(signal.SIGKILL)

    def interrupt(self) -> None:
        """Ask it to end: it alone, because what it has started is its own to tidy up."""
        self._interrupted = time.monotonic()
        signal.pidfd_send_signal(self.pidfd, signal.SIGINT)

    def finish(self) -> Outcome:
        """Take the outcome of one that has ended."""
        # Not waited for yet, so the number is still its own.
        self._signal_group(signal.SIGKILL)
        code = self._program.wait()
        os.close(self.pidfd)
        took = time.monotonic() - self._started
        try:
            if self._is_hanging:
                return self._failed(f"not done after {self.job.timeout_s:.0f} s", took)
            if code != 0:
                how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                return self._failed(f"it ended with {how}", took)
            try:
                outcome = Outcome.of_json(json.loads(self._outcome.read_text()))
            except (OSError, ValueError, TypeError, KeyError) as error:
                return self._failed(f"no outcome: {error!r}", took)
            self._log.unlink()
            return outcome
        finally:
            self._outcome.unlink(missing_ok=True)

    def _failed(self, how: str, took: float) -> Outcome:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES_MAX:]
        return failure_of(self.job, how, lines, took)

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._program.pid, number)


def failure_of(job: PoolTask, how: str, log: list[str], seconds: float = 0.0) -> Outcome:
    """Make the outcome of a task that came to no end of its own."""
    script = "\n".join([job.command, "", *(f"# {line}".rstrip() for line in log)])
    found = Discovery(f"{job.task.name}: {how}", script, culprit="campaign")
    return Outcome(discoveries=[found], seconds=seconds)
