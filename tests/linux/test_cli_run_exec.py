"""What survives an exec survives `run`: the table of chapter 9, with env(1) as the oracle."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import exec_probe, exec_stage
from tests.support.programs import (
    DEADLINE_S,
    INSTALLED,
    ROOT,
    Daemon,
    environment,
    warm_daemon,
)

__all__ = ["warm_daemon"]

pytestmark = pytest.mark.needs_root

SUBSETS: Final = [
    subset for size in range(4) for subset in itertools.permutations(("pid", "net", "mount"), size)
]
WORDS: Final = ("a b", "", "\udcff\n\x01\x7f", "".join(map(chr, range(1, 128))), "--", "-x", "*")
TABLE: Final = re.compile(r"^\| [^|]+ \| [^|]+ \| `(\w+)` \|$", re.MULTILINE)


def probed(directory: Path, *launcher: str) -> dict[str, Any]:
    """What a program finds that is started by a launcher from an unusual state."""
    place, result, errors = directory / "place", directory / "result", directory / "errors"
    place.mkdir(exist_ok=True)
    probe = (sys.executable, "-I", "-S", str(exec_probe.__file__), str(exec_stage.RESULT_FD))
    spec = json.dumps({"result": str(result), "is_root": os.geteuid() == 0})
    stage = (sys.executable, "-P", str(exec_stage.__file__), spec)
    handling = ("/usr/bin/env", "--list-signal-handling")
    with errors.open("w") as stderr, (directory / "input").open("w+") as stdin:
        code = subprocess.run(
            [*stage, *launcher, *handling, *probe, *WORDS],
            cwd=place,
            env=environment(),
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            timeout=DEADLINE_S,
            check=False,
        ).returncode
    said = errors.read_text()
    assert code == 0, said
    assert re.sub(r"^\S+ +\(.*\n", "", said, flags=re.MULTILINE) == ""
    found: dict[str, Any] = json.loads(result.read_text())
    return {**found, "ignored": sorted(re.findall(r"(\S+) +\( *\d+\): (?:\w+,)?IGNORE", said))}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probed")


@pytest.fixture(scope="module")
def oracle(directory: Path) -> dict[str, Any]:
    found = probed(directory, "/usr/bin/env")
    assert {"PIPE", "XFSZ", "HUP", "USR1"} < set(found["ignored"])
    assert {"9", "63", "200"} < set(found["descriptors"])
    assert found["environment"].encode("latin-1") == b"\0".join([*exec_stage.ENVIRONMENT, b""])
    assert found["timers"][0] == [True, 7.0]
    assert int(found["pending"][1], 16) != 0
    assert found["users"]["NoNewPrivs"] == "1"
    assert found["priority"][-1] == "best-effort: prio 6\n"
    assert found["attributes"][2:] == ["00040000\n", "12345\n", "0"]
    return found


def test_basic_the_table_of_the_book_is_what_is_compared(oracle: dict[str, Any]) -> None:
    chapter = (ROOT / "specs" / "09-node.md").read_text(encoding="utf-8")
    assert sorted(TABLE.findall(chapter)) == sorted(oracle)


@pytest.mark.sample(3)
@pytest.mark.clause("RUN-1")
@pytest.mark.parametrize("subset", SUBSETS, ids=",".join)
def test_what_survives_an_exec_survives_run(
    daemon: Daemon,
    directory: Path,
    oracle: dict[str, Any],
    subset: tuple[str, ...],
    allocation_id: str,
) -> None:
    words = ("--socket", str(daemon.socket), "--id", allocation_id)
    found = probed(directory, INSTALLED, "run", *words, "--namespaces", ",".join(subset), "--")
    if {"pid", "mount"} <= set(subset):  # its /proc has no number for a group of another namespace
        assert found.pop("group") == ["0", "0"]
        found["group"] = oracle["group"]
    assert found == oracle


@pytest.mark.clause("RUN-1")
@pytest.mark.parametrize("sh", ["dash", "bash"])
def test_whichever_shell_is_sh_all_survives(
    daemon: Daemon, directory: Path, oracle: dict[str, Any], sh: str, allocation_id: str
) -> None:
    words = ("--socket", str(daemon.socket), "--id", allocation_id, "--namespaces", "net", "--")
    assert probed(directory, f"/bin/{sh}", "-p", INSTALLED, "run", *words) == oracle


@pytest.mark.clause("RUN-1")
def test_without_an_installation_all_survives_but_two_dispositions(
    daemon: Daemon, directory: Path, oracle: dict[str, Any], allocation_id: str
) -> None:
    """A Python ignores them from its first instruction, so what they were is not known."""
    words = ("--socket", str(daemon.socket), "--id", allocation_id, "--namespaces", "net", "--")
    found = probed(directory, sys.executable, "-I", "-m", "linux", "run", *words)
    assert set(oracle["ignored"]) - set(found.pop("ignored")) == {"PIPE", "XFSZ"}
    assert found == {key: value for key, value in oracle.items() if key != "ignored"}
