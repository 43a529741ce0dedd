"""The demonstration shows what it says, can fail, and leaves nothing, with and without root."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from linux.demo import command as demo
from linux.demo.host import PREFIX
from linux.demo.report import COLUMNS_MAX, DemoStopped, Report
from tests.support.programs import environment, nshandoff

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("statemachine", "transport", "linux")
RUN_TIMEOUT_S: Final = 110
NOBODY: Final = 65534
LIFE: Final = ["requested", "created", "handed_off", "ended", "released"]

ALWAYS: Final = {
    *("first.types", "second.types", "descriptors", "distinct"),
    *("first.again", "second.again", "first.conflict", "first.ended", "second.ended"),
    *("first.life", "second.life", "stopped", "census.descriptors", "census.children"),
}
"""The checks of every run, a simulated one included."""

ON_A_KERNEL: Final = ALWAYS | {
    *("foreign", "mounts", "inside.namespaces", "inside.orphan", "inside.init", "inside.proc"),
    *("inside.net", "inside.loopback", "second.proc", "second.killed", "dead"),
    *("census.namespace_members", "census.mounts", "census.loop_devices"),
}
"""With real namespaces."""

WITH_SCOPES: Final = ON_A_KERNEL | {"inside.scope", "scopes", "census.cgroups"}

AS_ROOT: Final = WITH_SCOPES | {
    *("loop", "inside.image", "inside.readonly", "inside.options", "second.image", "freed"),
}
"""With scopes and an image as well: everything there is."""

CHAPTERS: Final = ("ASK", "INSIDE", "END")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demonstration makes its private folder, and must not leave it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(PREFIX)] == []


def run_demo(
    *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return nshandoff("demo", *arguments, env=environment(**(env or {})), timeout=RUN_TIMEOUT_S)


def names_in(shown: dict[str, Any]) -> set[str]:
    return {check["name"] for check in shown["checks"]}


def failures_in(shown: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in shown["checks"] if not check["holds"]]


# --- as root ----------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_basic_root_sees_every_check_hold(cgroup2: Path) -> None:
    run = run_demo("--json")
    shown = json.loads(run.stdout)
    assert (run.returncode, failures_in(shown), run.stderr) == (0, [], "")
    assert names_in(shown) == AS_ROOT
    assert shown["missing"] == {}
    assert shown["lifecycles"] == {"first": LIFE, "second": LIFE}


@pytest.mark.needs_root
def test_the_text_is_narrow_and_plain_and_says_what_the_json_says(cgroup2: Path) -> None:
    run = run_demo()
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= COLUMNS_MAX
    assert run.stdout.isascii()
    assert "\x1b" not in run.stdout
    assert len([line for line in lines if line.startswith("  ok  ")]) == len(AS_ROOT)
    assert [line for line in lines if line.startswith("  NO  ")] == []
    assert f"{len(AS_ROOT)} checks, every one held." in lines[-1]


@pytest.mark.needs_root
def test_a_check_that_does_not_hold_is_shown_and_decides_the_exit(
    cgroup2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrule = {"inside.net": ["lo down"], "first.types": "Net Pid Mount"}
    assert demo.main([], overrule=overrule) == 1
    said = capsys.readouterr().out
    assert "  NO  its only interface is lo, and lo is up\n      expected: lo down" in said
    assert "      found:    lo up" in said
    assert f"2 of {len(AS_ROOT)} checks did not hold." in said


@pytest.mark.sample(3)
@pytest.mark.needs_root
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_stop_in_any_chapter_leaves_nothing(cgroup2: Path, chapter: str) -> None:
    said = io.StringIO()
    report = Report(said, is_stopped=lambda: f"\n{chapter}  " in said.getvalue())
    with pytest.raises(DemoStopped):
        demo.perform(report, is_simulated=False)
    assert f"\n{chapter}  " in said.getvalue()


@pytest.mark.sample(2)
@pytest.mark.needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_leaves_nothing(cgroup2: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "linux", "demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("  provider"):
                break
        # As a terminal does: to all of the foreground.
        os.killpg(running.pid, number)
        _, complaint = running.communicate(timeout=RUN_TIMEOUT_S)
    assert running.returncode == 128 + number
    assert complaint == "nshandoff: interrupted; everything is cleaned up\n"


@pytest.mark.needs_root
def test_a_reader_that_goes_away_stops_it_and_leaves_nothing(cgroup2: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "linux", "demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr is not None
        assert running.stderr.read() == ""
    assert running.returncode == 128 + signal.SIGPIPE


@pytest.mark.needs_root
def test_a_provider_that_is_killed_is_a_failed_check_and_leaves_nothing(cgroup2: Path) -> None:
    said = io.StringIO()
    killed: list[int] = []

    def kill_the_provider_once() -> bool:
        if "\nAGAIN  " in said.getvalue() and not killed:
            killed.append(int(report.facts["provider"].rpartition(" ")[2]))
            os.kill(killed[0], signal.SIGKILL)
        return False

    report = Report(said, is_stopped=kill_the_provider_once)
    demo.perform(report, is_simulated=False)
    assert [check.name for check in report.failures] == ["story"]


@pytest.mark.needs_root
def test_without_mksquashfs_it_says_so_and_shows_the_rest(cgroup2: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "cat", "sleep", "true"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    run = run_demo("--json", env={"PATH": str(programs)})
    shown = json.loads(run.stdout)
    assert (run.returncode, failures_in(shown)) == (0, [])
    assert "squashfs-tools" in shown["missing"]["the image"]
    assert names_in(shown) == WITH_SCOPES


# --- without root -----------------------------------------------------------------------------

AsNobody = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def as_nobody() -> Iterator[AsNobody]:
    """
    Run the demonstration as a user without any right, in a copy that this user may read.

    The interpreter is wherever it is, perhaps in root's home: in a mount namespace of its own the
    copy gets it as well.
    """
    folder = Path(tempfile.mkdtemp(prefix="nobody-", dir="/tmp"))
    try:
        for package in PACKAGES:
            _copy(ROOT / package, folder / "tree" / package)
        for module in ("msgpack", "transitions", "six"):
            spec = importlib.util.find_spec(module)
            assert spec is not None
            assert spec.origin is not None
            origin = Path(spec.origin)
            is_package = origin.name == "__init__.py"
            source = origin.parent if is_package else origin
            # Where the packages are: a PYTHONPATH of the caller is not for the tool.
            _copy(source, folder / "tree" / source.name)
        for name in ("python", "tmp"):
            (folder / name).mkdir()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        (folder / "tmp").chmod(0o1777)
        yield lambda *arguments, path=os.environ["PATH"]: _run_as_nobody(folder, arguments, path)
        assert list((folder / "tmp").iterdir()) == []
    finally:
        shutil.rmtree(folder)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _run_as_nobody(
    folder: Path, arguments: Sequence[str], path: str
) -> subprocess.CompletedProcess[str]:
    base = Path(sys.base_prefix).resolve()
    python = folder / "python" / Path(sys.executable).resolve().relative_to(base)
    # The shell's own programs are found in the caller's PATH, the demonstration's in `path`.
    script = 'mount --bind "$1" "$2"; shift 2; user=$1; shift; exec setpriv --reuid $user "$@"'
    return subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", script, "sh"),
            *(str(base), str(folder / "python"), str(NOBODY)),
            *("--regid", str(NOBODY), "--clear-groups", "env", "-i"),
            *(f"PATH={path}", "HOME=/", f"TMPDIR={folder / 'tmp'}", "PYTHONDONTWRITEBYTECODE=1"),
            f"PYTHONPATH={folder / 'tree'}",
            *(str(python), "-m", "linux", "demo", *arguments),
        ],
        # A folder that this user may not even enter.
        cwd=Path(os.environ["TMPDIR"]),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )


@pytest.mark.needs_root
def test_without_root_the_namespaces_are_real_and_what_is_missing_is_said(
    as_nobody: AsNobody,
) -> None:
    run = as_nobody("--backend", "linux", "--json")
    assert run.returncode == 0, run.stderr + run.stdout
    shown = json.loads(run.stdout)
    assert failures_in(shown) == []
    assert names_in(shown) == ON_A_KERNEL
    assert f"user {NOBODY}, root in a user namespace" in shown["facts"]["machine"]
    assert set(shown["missing"]) == {"scopes", "the image"}
    assert "EPERM" in shown["missing"]["the image"]
    assert shown["lifecycles"] == {"first": LIFE, "second": LIFE}


@pytest.mark.needs_root
def test_without_root_in_a_cgroup_of_the_users_own_there_are_scopes_too(
    as_nobody: AsNobody, cgroup2: Path, allocation_id: str
) -> None:
    ours = cgroup2 / allocation_id
    home = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()[-1].rpartition(":")[2]
    ours.mkdir()
    try:
        for path in (ours, *(ours / name for name in ("cgroup.procs", "cgroup.subtree_control"))):
            os.chown(path, NOBODY, NOBODY)
        (ours / "cgroup.procs").write_text("0", encoding="ascii")
        try:
            run = as_nobody("--json")
        finally:
            (cgroup2 / home.strip("/") / "cgroup.procs").write_text("0", encoding="ascii")
        assert run.returncode == 0, run.stderr + run.stdout
        shown = json.loads(run.stdout)
        assert (failures_in(shown), names_in(shown)) == ([], WITH_SCOPES)
        assert set(shown["missing"]) == {"the image"}
    finally:
        ours.rmdir()


@pytest.mark.needs_root
def test_without_user_namespaces_it_is_simulated_unless_that_is_not_wanted(
    as_nobody: AsNobody,
) -> None:
    run = as_nobody("--json", path="/nowhere")
    assert run.returncode == 0, run.stderr + run.stdout
    shown = json.loads(run.stdout)
    assert (failures_in(shown), names_in(shown)) == ([], ALWAYS)
    assert "unshare: No such file or directory" in shown["missing"]["namespaces"]
    run = as_nobody("--backend", "linux", path="/nowhere")
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith("nshandoff: no root, and no user namespace either: unshare: ")


# --- simulated --------------------------------------------------------------------------------


def test_simulated_it_needs_nothing_and_keeps_the_protocol() -> None:
    run = run_demo("--backend", "simulated", "--json", env={"PATH": "/nowhere"})
    shown = json.loads(run.stdout)
    assert (run.returncode, failures_in(shown), run.stderr) == (0, [], "")
    assert names_in(shown) == ALWAYS
    assert shown["lifecycles"] == {"first": LIFE, "second": LIFE}


def test_every_check_can_fail(capsys: pytest.CaptureFixture[str]) -> None:
    overrule: dict[str, object] = dict.fromkeys(ALWAYS, "something else")
    assert demo.main(["--backend", "simulated", "--json"], overrule=overrule) == 1
    shown = json.loads(capsys.readouterr().out)
    assert not shown["holds"]
    assert {check["name"] for check in failures_in(shown)} == ALWAYS


@pytest.mark.needs_root  # another user's demonstration would execute itself anew, in this place
def test_a_node_that_cannot_serve_is_no_failed_check(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A socket's path holds 107 bytes; this one is longer before it begins.
    deep = folders / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    assert demo.main([]) == 3
    assert "nshandoff: the provider does not serve: " in capsys.readouterr().err
    assert list(deep.iterdir()) == []


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert demo._is_coloured(Terminal())
    assert not demo._is_coloured(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not demo._is_coloured(Terminal())
