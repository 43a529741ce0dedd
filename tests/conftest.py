"""What every test can count on: Hypothesis profiles, shared fixtures, and nothing left behind.

Fixtures: `cgroup2`, `allocation_id`, `image_root`, `make_image`; marker: `needs_root`. The autouse
fixture `census` fails a test that leaves a descriptor, a thread, a process, a scope, a loop device
or a mount. As root, each process that runs tests has a cgroup and a mount table of its own.
"""

from __future__ import annotations

import itertools
import os
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import core as hypothesis_core
from hypothesis.database import DirectoryBasedExampleDatabase

from linux.testing.worlds import SCOPE_PREFIX
from tests.support import isolation
from tests.support.census import MACHINE_WIDE, Census, Session

IN_CI: Final = os.environ.get("CI", "").lower() not in ("", "0", "false", "no")
PERMITTED_SKIP: Final = "kernel lacks"
"""How the reason of a skip must begin to be one under CI."""
IGNORED_IN_THE_BACKGROUND: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
"""What `nohup` and the `&` of a script have a process ignore: programs of tests shall not."""

_RAN: Final = {"passed", "failed", "xfailed", "xpassed"}
"""What pytest calls a test that has run."""

EXAMPLES: Final = (
    Path(os.environ.get("HYPOTHESIS_STORAGE_DIRECTORY", ".hypothesis")).absolute() / "examples"
)
"""Where the long profile keeps what failed; any number of processes may share it."""

# How fast a machine is today is no property of the code: no deadline, no complaint about slowness.
settings.register_profile(
    "dev",
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "ci", settings.get_profile("dev"), derandomize=True, database=None, max_examples=100
)
# Other examples every time; what failed once is tried first, by every process that shares the
# directory. The seed is printed: `--hypothesis-seed` runs the same again.
settings.register_profile(
    "long",
    settings.get_profile("dev"),
    derandomize=False,
    database=DirectoryBasedExampleDatabase(EXAMPLES),
    max_examples=5_000,
)
settings.load_profile("ci" if IN_CI else "dev")  # --hypothesis-profile=long comes later, and wins

CAMPAIGN: Final = Path(__file__).parent / "campaign"

MakeImage = Callable[[Path, Mapping[str, str]], Path]

DESCRIPTORS: Final = 16_384
"""How many descriptors a process that runs tests may have open, where that can be had."""

WORKERS_MAX: Final = 4
"""How many processes run tests with `-n auto`; at most one more than cores, as tests also wait."""

session_census: Final = Session()
_at_start: Final = pytest.StashKey[Census]()
_isolation: Final = pytest.StashKey[isolation.Isolation]()
_call_failed: Final = pytest.StashKey[bool]()
_cases: Final = pytest.StashKey[Counter[str]]()
"""How many cases of each test with the mark `sample` there are."""
_notes: Final = pytest.StashKey[list[str]]()
"""To be said at the end; a worker of pytest-xdist has its controller say it."""
_left: Final = pytest.StashKey[list[str]]()
"""The same, of what was left behind."""


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "write down what the kernels do in the scenarios of specs/scenarios/"
    parser.addoption("--rewrite-scenarios", action="store_true", help=told)
    told = "only what takes long and this part of a campaign does"
    parser.addoption("--deep", metavar="PART", help=told)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_root: makes real namespaces, cgroups or mounts")
    config.addinivalue_line("markers", "deep(part): in `make verify` this part does it")
    config.addinivalue_line("markers", "sample(n): but for one in n of its cases, deep('long')")
    config.stash[_notes], config.stash[_left] = [], []
    # A user has a soft limit of 1,024, which also is how many of theirs can be in sockets.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(DESCRIPTORS, hard)), hard))
    for number in IGNORED_IN_THE_BACKGROUND:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if config.getoption("--hypothesis-profile") == "long" and config.option.hypothesis_seed is None:
        # The workers of pytest-xdist get the options, and so the seed.
        config.option.hypothesis_seed = secrets.randbelow(2**32)
        hypothesis_core.global_force_seed = config.option.hypothesis_seed
    if is_controller(config):
        return
    if hasattr(config, "workerinput"):
        # What pytest-xdist has chosen is too long for the paths of sockets in there.
        number = config.workerinput["workerid"].removeprefix("gw")
        config.option.basetemp = Path(config.option.basetemp).with_name(number)
    # Who deals with the scopes of a provider that runs already has to see them.
    if (
        os.geteuid() == 0
        and session_census.cgroup2
        and config.getoption("--provider-socket") is None
    ):
        try:
            config.stash[_isolation] = isolation.enter(session_census.cgroup2)
        except OSError as error:
            config.stash[_notes].append(f"not isolated, so others may disturb: {error}")
    config.stash[_at_start] = session_census.census()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _isolation in config.stash:
        config.stash[_isolation].leave()


def is_controller(config: pytest.Config) -> bool:
    """Whether this process has others run the tests."""
    return config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(WORKERS_MAX, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, key in (("notes", _notes), ("left", _left)):
        lines = getattr(node, "workeroutput", {}).get(name, ())  # a worker that crashed has none
        node.config.stash[key] += [line for line in lines if line not in node.config.stash[key]]


def pytest_report_header() -> list[str]:
    seed = hypothesis_core.global_force_seed
    return [] if seed is None else [f"hypothesis seed: {seed}"]


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in item.iter_markers("sample"):
        cases = item.session.stash.setdefault(_cases, Counter())
        function = item.nodeid.partition("[")[0]
        if cases[function] % mark.args[0]:
            item.add_marker(pytest.mark.deep("long"))
        cases[function] += 1
    for mark in item.iter_markers("deep"):
        if not (CAMPAIGN / f"{mark.args[0]}_campaign.py").exists():
            raise pytest.UsageError(f"{item.nodeid}: a campaign has no part {mark.args[0]!r}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--deep")
    if part is None:
        return
    marked = [any(part in mark.args for mark in item.iter_markers("deep")) for item in items]
    chosen = [item for item, is_chosen in zip(items, marked, strict=True) if is_chosen]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    refuse_skip_in_ci(report)
    if call.when == "call":
        item.stash[_call_failed] = report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    refuse_skip_in_ci(report)
    return report


def refuse_skip_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Under CI turn a skip into a failure, unless the kernel is what is missing."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        reason = text.removeprefix("Skipped: ")
        if not reason.startswith(PERMITTED_SKIP):
            report.outcome = "failed"
            report.longrepr = f"skipped, which CI does not permit: {reason}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What fixtures of a wider scope left is no single test's, and still a failure of the run."""
    config = session.config
    notes, left = config.stash[_notes], config.stash[_left]
    if _at_start in config.stash:
        found = session_census.left_since(config.stash[_at_start], MACHINE_WIDE)
        left += session_census.clean(found)
    if hasattr(config, "workeroutput"):
        config.workeroutput["notes"], config.workeroutput["left"] = notes, left
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if left:
        notes += ["left behind by the session:", *(f"  {line}" for line in left)]
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif IN_CI and _is_green_for_nothing(session, reporter.stats):
        notes += ["not one test has run"]
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    for line in ("", *notes) if reporter and notes else ():
        reporter.write_line(line, red=True)


def _is_green_for_nothing(session: pytest.Session, stats: Mapping[str, object]) -> bool:
    is_green = session.exitstatus == pytest.ExitCode.OK
    return is_green and not session.config.option.collectonly and not _RAN & stats.keys()


@pytest.fixture(autouse=True, scope="session")
def _session_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have all that is made on the way below directories that are this session's alone."""
    ours = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="nsh-") as own:
        Path(own).chmod(0o755)  # tests ask as other users, too
        patch.setenv("TMPDIR", own)
        patch.setattr(tempfile, "tempdir", None)
        session_census.directories = f"{ours}/", f"{own}/"
        yield


@pytest.fixture(autouse=True)
def census(request: pytest.FixtureRequest) -> Iterator[Census]:
    """What was there before the test; afterwards nothing more may be there."""
    before = session_census.census()
    yield before
    if request.node.stash.get(_call_failed, True):
        # Its traceback keeps descriptors alive. One failure is enough; the machine is tidied.
        left = session_census.left_since(before, MACHINE_WIDE, patience_s=0.5)
        for line in session_census.clean(left):
            request.node.add_report_section("teardown", "left behind", line)
        return
    left = session_census.left_since(before)
    if left:
        account = "\n  ".join(["left behind by the test:", *session_census.clean(left)])
        pytest.fail(account, pytrace=False)


@pytest.fixture(scope="session")
def cgroup2() -> Path:
    """Where this node has mounted cgroup v2."""
    if session_census.cgroup2 is None:
        is_known = "\tcgroup2\n" in Path("/proc/filesystems").read_text()
        pytest.skip("cgroup v2 is not mounted" if is_known else "kernel lacks cgroup v2")
    return session_census.cgroup2


_numbers = itertools.count(1)


@pytest.fixture
def allocation_id() -> str:
    """A valid id that no other run on this machine uses; append to it for several."""
    return f"{SCOPE_PREFIX}{next(_numbers)}"


@pytest.fixture(scope="session")
def make_image(tmp_path_factory: pytest.TempPathFactory) -> MakeImage:
    """Call it with a path and the files by name; those below `bin/` are made executable."""
    mksquashfs = shutil.which("mksquashfs")
    if mksquashfs is None:
        pytest.skip("mksquashfs is missing (Debian package squashfs-tools)")

    def make(image: Path, files: Mapping[str, str]) -> Path:
        tree = tmp_path_factory.mktemp("image-tree")
        for name, text in files.items():
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755 if name.startswith("bin/") else 0o644)
        image.parent.mkdir(parents=True, exist_ok=True)
        options = ["-noappend", "-all-root", "-no-progress", "-quiet"]
        subprocess.run([mksquashfs, tree, image, *options], check=True, stdout=subprocess.DEVNULL)
        return image

    return make


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory, make_image: MakeImage) -> Path:
    """A directory with one image, `hello.sqfs`; shared, so make your own to change anything."""
    root = tmp_path_factory.mktemp("uenv")
    files = {
        "hello.txt": "hello from the image\n",
        "bin/marker": "#!/bin/sh\necho marker\n",
    }
    make_image(root / "hello.sqfs", files)
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte and few files, to be filled; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k,nr_inodes=64", "tmpfs", disk], check=True
    )
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)
