"""A campaign does each task once, survives what its tasks do, and forgets nothing it has found."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from linux.cli import command as cli
from linux.cli import verify as cli_verify
from tests.campaign import long_campaign, verify, verify_record
from tests.campaign.outcome import Outcome, Task
from tests.campaign.verify_pool import PoolTask, file_name_of
from tests.campaign.verify_record import CampaignRecord, Head
from tests.support.programs import DEADLINE_S, ROOT, environment, nshandoff, wait_until

MINE: Final = ("verify*.py", "report*.py", "report.css", "outcome.py", "__init__.py")

COUNTING: Final = '''
"""Counts to four; the third waits until it may."""
import os, time
from pathlib import Path
from tests.campaign.outcome import Outcome, Task

ROOT = Path(__file__).parents[2]

def tasks(scale):
    return [Task(f"count {number}", {"number": number}) for number in range(4)]

def run(seed, number):
    with (ROOT / "ran").open("a") as file:
        print(number, seed, os.getpid(), file=file, flush=True)
    while number == 2 and (ROOT / "closed").exists():
        time.sleep(0.01)
    return Outcome(figures={"numbers": 1})
'''

BROKEN: Final = '''
"""Ends in every way in which a task should not."""
import os, signal, sys, time
from tests.campaign.outcome import Outcome, Task

timeout_s = 1.0

def tasks(scale):
    return [Task(how, {"how": how}) for how in ("raises", "dies", "hangs", "lies", "is well")]

def run(seed, how):
    print(f"this is the log of what {how}")
    sys.stdout.flush()
    if how == "raises":
        raise RuntimeError("no luck")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(3600)
    if how == "lies":
        os._exit(0)
    return Outcome()
'''

ALONE: Final = '''
"""Tasks that notice when they are not alone."""
import time
from pathlib import Path
from tests.campaign.outcome import Outcome, Task

alone = True
HERE = Path(__file__).parents[2] / "here"

def tasks(scale):
    return [Task(f"alone {number}") for number in range(3)]

def run(seed):
    HERE.mkdir()
    time.sleep(0.2)
    HERE.rmdir()
    return Outcome()
'''

UNLISTED: Final = '"""Not even this."""\nimport a_module_that_is_not_there\n'


class Tree:
    """A source tree with the campaign's program and parts of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "output"
        shutil.copytree(ROOT / "statemachine", root / "statemachine")
        (root / "linux" / "cli").mkdir(parents=True)
        shutil.copy(ROOT / "linux" / "cli" / "exits.py", root / "linux" / "cli")
        for package in ("linux", "linux/cli"):
            (root / package / "__init__.py").write_text("")
        own = root / "tests" / "campaign"
        support = root / "tests" / "support"
        for folder in (own, support):
            folder.mkdir(parents=True)
        (root / "tests" / "__init__.py").write_text("")
        shutil.copy(ROOT / "tests" / "support" / "isolation.py", support)
        for path in (p for pattern in MINE for p in (ROOT / "tests" / "campaign").glob(pattern)):
            shutil.copy(path, own)

    def part(self, name: str, text: str) -> None:
        (self.root / "tests" / "campaign" / f"{name}_campaign.py").write_text(text)

    @property
    def command(self) -> list[str]:
        program = str(self.root / "tests" / "campaign" / "verify.py")
        return [sys.executable, program, "--output", str(self.output)]

    def verify(self, *words: str) -> subprocess.CompletedProcess[str]:
        with self.running(*words) as program:
            out, errors = program.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(program.args, program.returncode, out, errors)

    @contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [*self.command, *words],
            env=environment(PYTHONPATH=""),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as program:
            try:
                yield program
            finally:
                program.kill()

    @contextmanager
    def paused(self) -> Iterator[subprocess.Popen[str]]:
        """The counting part, one task after the other, until the third waits for `go_on`."""
        self.part("count", COUNTING)
        (self.root / "closed").touch()
        with self.running("--jobs", "1") as program:
            wait_until(lambda: self.numbers == [0, 1, 2])
            yield program

    def go_on(self) -> None:
        (self.root / "closed").unlink()

    @property
    def ran(self) -> list[tuple[int, int, int]]:
        """Which number, seed and process, run by run."""
        with suppress(FileNotFoundError):
            lines = (self.root / "ran").read_text().splitlines()
            return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]
        return []

    @property
    def numbers(self) -> list[int]:
        return [number for number, _, _ in self.ran]

    def recorded(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The head of what is written down, and the tasks that are done."""
        lines = (self.output / "outcomes.ndjson").read_text().splitlines()
        head, *done = map(json.loads, lines)
        return head["campaign"], done


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_basic_every_task_is_done_once_and_shown(tree: Tree) -> None:
    tree.part("count", COUNTING)
    told = tree.verify("--seed", "42", "--jobs", "2")
    assert told.returncode == 0, told.stderr
    assert sorted(tree.numbers) == [0, 1, 2, 3]
    assert told.stderr.startswith("seed 42, ")
    assert told.stderr.count(" count: count ") == 4  # a line for each, as it is no terminal
    assert "4/4" in told.stderr
    assert "\r" not in told.stderr
    assert "4  numbers" in told.stdout
    page = tree.output / "report.html"
    assert told.stdout.endswith(f"{page}\n")
    assert told.stdout.startswith("Not measured: ")
    assert "Of what was run, every promise held" in page.read_text()


def test_a_campaign_that_was_killed_goes_on_where_it_was(tree: Tree) -> None:
    with tree.paused() as program:
        program.kill()
    # Its task does not outlive it.
    wait_until(lambda: is_gone(tree.ran[2][2]))
    tree.go_on()
    seed = tree.recorded()[0]["seed"]

    told = tree.verify("--jobs", "1")
    assert told.returncode == 0, told.stderr
    assert "2 tasks are done already" in told.stderr
    assert f"seed {seed}," in told.stderr
    assert tree.numbers == [0, 1, 2, 2, 3]
    assert tree.ran[2][1] == tree.ran[3][1]  # the same seed again

    again = tree.verify()
    assert again.returncode == 0
    assert len(tree.numbers) == 5
    assert tree.verify("--fresh").returncode == 0
    assert len(tree.numbers) == 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_ends_its_tasks_and_says_how_to_go_on(
    tree: Tree, number: signal.Signals
) -> None:
    with tree.paused() as program:
        program.send_signal(number)
        out, errors = program.communicate(timeout=DEADLINE_S)
    assert program.returncode == 128 + number
    assert is_gone(tree.ran[2][2])
    assert errors.endswith("interrupted; the same command goes on where it was\n")
    assert "count: 2 tasks" in out
    assert len(tree.recorded()[1]) == 2


def test_a_task_that_fails_is_a_finding_and_not_the_end(tree: Tree) -> None:
    tree.part("broken", BROKEN)
    tree.part("unlisted", UNLISTED)
    told = tree.verify("--jobs", "2")
    assert told.returncode == 1, told.stderr
    _, done = tree.recorded()
    found = {one["name"]: one["outcome"]["discoveries"] for one in done}
    assert set(found) == {"raises", "dies", "hangs", "lies", "is well", "tasks"}
    assert found["is well"] == []
    for name, says, log in [
        ("raises", "exit code 1", "RuntimeError: no luck"),
        ("dies", "SIGKILL", "this is the log of what dies"),
        ("hangs", "not done after 1 s", "KeyboardInterrupt"),
        ("lies", "no outcome", "this is the log of what lies"),
        ("tasks", "a_module_that_is_not_there", "verify_task unlisted"),
    ]:
        (discovery,) = found[name]
        assert discovery["title"].startswith(f"{name}: ")
        assert says in discovery["title"]
        assert log in discovery["script"]
        seed = next(one["seed"] for one in done if one["name"] == name)
        assert f"{discovery['title']} (seed {seed})" in told.stderr
    assert (tree.output / "logs" / f"{file_name_of('0-broken-raises')}.log").exists()
    assert not (tree.output / "logs" / f"{file_name_of('0-broken-is well')}.log").exists()
    page = (tree.output / "report.html").read_text()
    assert "5 faults of the campaign itself" in page
    assert "RuntimeError: no luck" in page

    # The command that a finding names finds it again.
    command = found["raises"][0]["script"].splitlines()[0].replace("python", sys.executable, 1)
    again = subprocess.run(
        command, shell=True, cwd=tree.root, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "RuntimeError: no luck" in again.stderr


@pytest.mark.deep("long")
def test_tasks_that_must_be_alone_are(tree: Tree) -> None:
    tree.part("alone", ALONE)
    tree.part("count", COUNTING)
    told = tree.verify("--jobs", "4")
    assert told.returncode == 0, told.stdout


def test_long_tasks_are_begun_before_others(tree: Tree) -> None:
    tree.part("count", COUNTING.replace('"number": number})', '"number": number}, number == 3)'))
    assert tree.verify("--jobs", "1").returncode == 0
    assert tree.numbers == [3, 0, 1, 2]


@pytest.mark.deep("long")
def test_what_another_tree_has_shown_is_not_used(tree: Tree) -> None:
    tree.part("count", COUNTING)
    assert tree.verify("--seed", "7").returncode == 0
    with (tree.root / "statemachine" / "table.py").open("a") as file:
        file.write("# another tree\n")
    told = tree.verify("--seed", "7")
    assert told.returncode == 0
    assert "the sources have changed: starting anew" in told.stderr
    assert len(tree.numbers) == 8
    assert "starting anew" in tree.verify("--seed", "8").stderr
    assert len(tree.numbers) == 12


def test_sources_that_change_meanwhile_make_no_verdict(tree: Tree) -> None:
    with tree.paused() as program:
        (tree.root / "statemachine" / "more.py").touch()
        tree.go_on()
        _, errors = program.communicate(timeout=DEADLINE_S)
    assert program.returncode == 1
    assert "the sources changed while it ran" in errors


def test_only_the_parts_that_are_named_are_run(tree: Tree) -> None:
    tree.part("count", COUNTING)
    tree.part("broken", BROKEN)
    assert tree.verify("--part", "count").returncode == 0
    assert {one["part"] for one in tree.recorded()[1]} == {"count"}
    refused = tree.verify("--part", "nonsense")
    assert refused.returncode == 2
    assert "'broken', 'count'" in refused.stderr


@pytest.mark.deep("long")
def test_hours_are_filled_with_rounds_of_other_seeds(tree: Tree) -> None:
    tree.part("count", COUNTING)
    told = tree.verify("--hours", "0.001")  # 3.6 s: on a busy machine a round takes more than one
    assert told.returncode == 0, told.stderr
    assert len(tree.numbers) > 4
    assert len(tree.numbers) % 4 == 0
    seeds = {(number, seed) for number, seed, _ in tree.ran}
    assert len(seeds) == len(tree.ran)


def test_two_campaigns_do_not_write_to_one_place(tree: Tree) -> None:
    with tree.paused() as program:
        refused = tree.verify()
        assert refused.returncode == 3
        assert f"another campaign writes {tree.output / 'outcomes.ndjson'}" in refused.stderr
        tree.go_on()
        program.communicate(timeout=DEADLINE_S)
    assert program.returncode == 0


@pytest.mark.deep("long")
def test_on_a_terminal_progress_is_one_line_that_is_redrawn(tree: Tree) -> None:
    tree.part("count", COUNTING)
    ours, theirs = pty.openpty()
    try:
        told = subprocess.run(
            [*tree.command, "--jobs", "1"],
            env=environment(PYTHONPATH=""),
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            timeout=DEADLINE_S,
            check=False,
        )
        said = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert told.returncode == 0
    assert said.count("\n") == 1  # that of the seed
    drawn = said.split("\r\x1b[2K")
    assert any("4/4" in line and "nothing found" in line for line in drawn)
    assert all(len(line) < 100 for line in drawn[1:])
    assert drawn[-1] == ""


# --- The record ----------------------------------------------------------------------------------


def job(name: str = "a task", number: int = 0) -> PoolTask:
    seed = verify_record.seed_of(1, number, "part", name)
    return PoolTask("part", Task(name, {"n": 1}), number, seed, is_alone=False, timeout_s=1.0)


def test_seeds_depend_on_the_campaigns_and_on_which_task_it_is() -> None:
    assert verify_record.seed_of(42, 0, "explore", "one crash") == 2228398200
    others = [(43, 0, "explore", "one crash"), (42, 1, "explore", "one crash")]
    others += [(42, 0, "faults", "one crash"), (42, 0, "explore", "two crashes")]
    seeds = {verify_record.seed_of(*other) for other in others}
    assert len(seeds | {2228398200}) == 5


def test_a_record_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    record = CampaignRecord(tmp_path)
    record.begin(Head("tree", 1, "now", {}))
    record.add(job("whole"), Outcome(figures={"a": 1}))
    record.add(job("cut off"), Outcome())
    record.close()
    file = tmp_path / "outcomes.ndjson"
    file.write_bytes(file.read_bytes()[:-9])

    record = CampaignRecord(tmp_path)
    assert record.head == Head("tree", 1, "now", {})
    assert list(record.done) == [job("whole").key]
    record.add(job("after"), Outcome())
    record.close()
    record = CampaignRecord(tmp_path)
    assert list(record.done) == [job("whole").key, job("after").key]
    record.close()


def test_a_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    prints = {verify_record.fingerprint(tmp_path)}
    for name, text in [("a", "x"), ("a", "y"), ("b", "y")]:
        (tmp_path / "specs" / name).write_text(text)
        prints.add(verify_record.fingerprint(tmp_path))
    assert len(prints) == 4
    (tmp_path / "specs" / "__pycache__").mkdir()
    (tmp_path / "specs" / "__pycache__" / "a.pyc").touch()
    assert verify_record.fingerprint(tmp_path) in prints


# --- The command ---------------------------------------------------------------------------------


def test_the_command_becomes_the_program_of_the_tree(tree: Tree) -> None:
    tree.part("count", COUNTING)
    options = ("--seed", "5", "--jobs", "2", "--part", "count", "--output", tree.output)
    told = nshandoff("verify", "--tree", tree.root, *options)
    assert told.returncode == 0, told.stderr
    assert told.stderr.startswith("seed 5, ")
    assert sorted(tree.numbers) == [0, 1, 2, 3]
    assert nshandoff("verify", "--tree", tree.root, "--jobs", "none").returncode == 2


def test_the_command_says_in_a_line_what_is_missing(tree: Tree) -> None:
    elsewhere = tree.root / "tests"
    told = nshandoff("verify", "--tree", elsewhere)
    assert (told.returncode, told.stdout) == (3, "")
    assert told.stderr.startswith(f"nshandoff: no tests/campaign/verify.py in {elsewhere}: ")
    assert told.stderr.count("\n") == 1

    bare = [sys.executable, "-S", "-m", "linux", "verify", "--tree", str(tree.root)]
    run = subprocess.run(bare, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 3
    assert run.stderr.startswith("nshandoff: hypothesis and pytest cannot be imported: ")
    assert run.stderr.count("\n") == 1


def test_the_command_hands_on_every_option_of_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: became.append(words))
    words = ["--hours=2", "--scale=0.5", "--jobs=3", "--seed=4", f"--output={tmp_path}"]
    options = cli.build_parser().parse_args(
        ["verify", "--tree", str(ROOT), *words, "--part", "rates", "--fresh"]
    )
    with suppress(TypeError):
        cli_verify.verify(options)
    (became_words,) = became
    assert became_words[:2] == [sys.executable, str(ROOT / "tests" / "campaign" / "verify.py")]
    taken = vars(verify._parse(became_words[2:]))
    assert taken == {
        "hours": 2.0,
        "scale": 0.5,
        "jobs": 3,
        "seed": 4,
        "output": tmp_path,
        "part": ["rates"],
        "fresh": True,
    }


def test_the_rates_are_measured_of_what_they_say() -> None:
    from tests.campaign import rates_campaign

    for task in rates_campaign.tasks(0.001):
        outcome = rates_campaign.run(1, **task.arguments)
        lives = task.arguments["lives"]
        assert lives == 10
        # Besides the six of each life: the provider is ready, a consumer connects.
        more = 0 if task.name == "rows through transitions" else 2
        assert outcome.figures[task.name] == lives * 6 + more
        assert outcome.figures[f"CPU seconds, {task.name}"] > 0


LONG_TESTS: Final = """
import pytest

def test_quick(): assert False

@pytest.mark.deep("long")
def test_long(): assert False

@pytest.mark.deep("explore")
def test_of_another_part(): assert False
"""


def test_a_long_test_that_fails_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = "from tests.conftest import pytest_addoption, pytest_collection_modifyitems\n"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(hooks)
    (tmp_path / "tests" / "test_it.py").write_text(LONG_TESTS)
    monkeypatch.setattr(long_campaign, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (task,) = long_campaign.tasks(1.0)
    (found,) = long_campaign.run(1, **task.arguments).discoveries
    assert "1 failed, 2 deselected" in found.title


def test_no_two_tasks_have_one_file() -> None:
    names = ["a" * 200, "a" * 201, "a b", "a/b", "a-b"]
    assert len({file_name_of(name) for name in names}) == len(names)
