"""What a campaign has found so far, in a file: every outcome is in it before the next one is.

The first line says which tree, which seed, on which machine; each further line is one task done.
A file of another tree is of no use: its sources said something else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import secrets
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from tests.campaign.outcome import Outcome
from tests.campaign.verify_pool import PoolTask

ROOT: Final = Path(__file__).parents[2]
FOLDERS: Final = ("statemachine", "transport", "linux", "specs", "tests", "bench")
PACKAGES: Final = ("hypothesis", "msgpack", "pytest", "transitions")
FINGERPRINT_DIGITS: Final = 16


@dataclass(frozen=True)
class Head:
    """Which campaign it is."""

    fingerprint: str
    """Of the sources."""
    seed: int
    started: str
    """When, in UTC."""
    environment: dict[str, str]


@dataclass(frozen=True)
class Done:
    """One task that was done."""

    key: str
    part: str
    name: str
    round: int
    seed: int
    outcome: Outcome


class Busy(Exception):
    """Another campaign writes there."""


class CampaignRecord:
    """Outcomes in a file of a directory; raises `Busy` while another campaign writes there."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._path = directory / "outcomes.ndjson"
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise Busy(f"another campaign writes {self._path}") from None
        self.head: Head | None = None
        self.done: dict[str, Done] = {}
        self._read()

    def begin(self, head: Head) -> None:
        """Forget what there is, and start anew."""
        self._file.truncate(0)
        self.head, self.done = head, {}
        self._append({"campaign": asdict(head)})

    def add(self, job: PoolTask, outcome: Outcome) -> None:
        """Write down what a task has to show."""
        done = Done(job.key, job.part, job.task.name, job.round, job.seed, outcome)
        self.done[done.key] = done
        self._append({**vars(done), "outcome": outcome.as_json()})

    def close(self) -> None:
        """Let others have it."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            try:
                said = json.loads(line)
                if self.head is None:
                    self.head = Head(**said["campaign"])
                else:
                    outcome = Outcome.of_json(said["outcome"])
                    self.done[said["key"]] = Done(**{**said, "outcome": outcome})
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        # What was being written when the campaign was killed is no outcome.
        self._file.truncate(whole)


def fingerprint(root: Path = ROOT) -> str:
    """Sum up the sources, so that two trees are told apart."""
    summed = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                summed.update(f"{path.relative_to(root)}\0{content}\n".encode())
    return summed.hexdigest()[:FINGERPRINT_DIGITS]


def fresh_seed() -> int:
    """Choose a seed."""
    return secrets.randbelow(2**32)


def seed_of(seed: int, number: int, part: str, name: str) -> int:
    """Derive a task's seed from its campaign's."""
    digest = hashlib.sha256(f"{seed} {number} {part} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def environment() -> dict[str, str]:
    """Say on what the campaign runs."""
    return {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: _version_of(name) for name in PACKAGES},
        "user": "root" if os.geteuid() == 0 else f"uid {os.geteuid()}",
        "commit": _commit(),
        "command": " ".join(["verify", *sys.argv[1:]]),
    }


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return told.stdout.strip() or "unknown"
