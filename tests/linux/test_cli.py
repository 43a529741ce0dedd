"""The command says what it can do, refuses what makes no sense, and takes one step at a time."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

import statemachine
from linux import backend
from linux.cgroups import DEFAULT_PLACE, ScopePlace
from linux.cli import command as cli
from linux.cli.exits import ExitCode
from linux.cli.parser import columns
from statemachine.messages import HANDOFF_SOCKET_PATH
from statemachine.provider import Limits
from tests.support.programs import (
    DEADLINE_S,
    MOUNT,
    PID,
    Daemon,
    identities_of,
    nshandoff,
    run_program,
    running,
    wait_until,
    warm_daemon,
)
from transport import endpoint, serve

__all__ = ["warm_daemon"]

VERBS = ("serve", "run", "exec", "request", "end", "list", "doctor", "trace", "verify")
ABSENT = ("--socket", "/nowhere/handoff.sock")


def test_basic_help_names_the_verbs_and_the_exit_codes() -> None:
    result = nshandoff("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for verb in (*VERBS, "demo"):
        assert f"\n    {verb} " in result.stdout
    for code in ExitCode:
        assert f"\n    {code.value} " in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert f"usage: nshandoff {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("told", ["", "x", "-3", "0", "40", "200"])
def test_help_is_as_wide_as_the_terminal(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", told)
    assert columns() == shutil.get_terminal_size().columns
    lines = cli.build_parser("list").format_help().splitlines()
    options = lines[lines.index("options:") : lines.index("exit codes:")]
    assert max(map(len, options)) < columns()


def test_help_loads_none_of_the_packages_it_helps_with() -> None:
    program = (
        "import sys; from linux.cli.command import build_parser; build_parser().format_help();"
        "print(*sys.modules)"
    )
    loaded = set(run_program(sys.executable, "-c", program).stdout.split())
    assert loaded.isdisjoint({"statemachine", "asyncio", "socket", "subprocess", "shutil"})
    # Its `__init__` alone says whether `statemachine` is another project's.
    assert not [name for name in loaded if name.startswith("transport.")]
    assert {name for name in loaded if name.startswith("linux.")} == {
        "linux.cli",
        "linux.cli.command",
        "linux.cli.exits",
        "linux.cli.parser",
    }


def test_version_is_the_projects() -> None:
    assert nshandoff("--version").stdout == f"nshandoff {statemachine.__version__}\n"


def test_defaults_are_those_of_the_modules_they_are_for() -> None:
    assert {
        "socket": HANDOFF_SOCKET_PATH,
        "state_dir": str(backend.STATE_DIR),
        "image_root": str(backend.IMAGE_ROOT),
        "uenv_base": str(backend.UENV_BASE),
    } == cli.DEFAULT_PATHS
    spans = serve.Spans()
    assert {
        "hold_time": backend.HOLD_TIME_S,
        "claim_timeout": spans.claim_s,
        "release_deadline": spans.release_s,
        "empty_grace": spans.empty_grace_s,
    } == cli.DEFAULT_SPANS_S
    limits = Limits()
    assert {
        "allocations": limits.allocations_per_uid,
        "connections": limits.connections_per_uid,
    } == cli.DEFAULT_COUNTS
    assert cli.DEFAULT_MODE == endpoint.SOCKET_MODE
    assert ScopePlace(*cli.DEFAULT_SCOPE) == DEFAULT_PLACE


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "VERB"),
        (["nonsense"], "there is no VERB 'nonsense'\n"),
        (["requst"], "did you mean request?"),
        (["--verson"], "did you mean --version?"),
        (["trace", "shw"], "did you mean show?"),
        (["serve", "--hold-tme=3"], "there is no option --hold-tme; did you mean --hold-time?"),
        (["serve", "--no-scope"], "did you mean --no-scopes?"),
        (["list", "--json", "-q"], "there is no option -q\n"),
        (["request", "--namespace", "pid", "--id", "x"], "did you mean --namespaces?"),
        (["request", "--id", "--namespace", "--namespaces", "pid"], "expected one argument"),
        (["request", "--namespaces", "pid"], "--id"),
        (["request", "--id", "x"], "--namespaces"),
        (["request", "--id", "x", "--namespaces", "pid,user"], "user"),
        (["request", "--id", "x", "--namespaces", "pid,net,pid"], "repeats Pid"),
        (["request", "--id", "a/b", "--namespaces", "pid"], "slash"),
        (["request", "--id", "x" * 129, "--namespaces", "pid"], "129 bytes"),
        (["request", "--id", "", "--namespaces", "pid"], "0 bytes"),
        (["request", "--id", "x", "--namespaces", "pid", "--uenv", "a"], "needs a Mount"),
        (["request", "--id", "x", "--namespaces", "mount", "--uenv", "../a"], "plain path"),
        (["request", "--id", "x", "--names", "pid"], "--namespaces"),
        (["end"], "ID"),
        (["end", ".."], "reserves"),
        (["serve", "--mode", "9"], "octal"),
        (["serve", "--mode", "1777"], "octal"),
        (["serve", "--hold-time", "-1"], "seconds"),
        (["serve", "--hold-time", "nan"], "seconds"),
        (["serve", "--allow-uid", "root"], "user id"),
        (["serve", "--allow-uid", "4294967295"], "user id"),
        (["serve", "--max-allocations", "0"], "number"),
        (["serve", "--max-connections", "many"], "number"),
        (["serve", "--group", "no such group"], "no group"),
        (["serve", "--group", "4294967295"], "no group"),
        (["serve", "--group", "9" * 20], "no group"),
        (["serve", "--uenv-base", "relative"], "absolute"),
        (["serve", "--uenv-base", "/"], "below /"),
        (["serve", "--uenv-base", "/run/../x"], "plain"),
        (["list", "surplus"], "surplus"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if words and words[0] in ("request", "end"):
        words = [*words, *ABSENT]
    assert cli.main(words) == ExitCode.USAGE
    result = capsys.readouterr()
    assert says in result.err
    verb = f"nshandoff {words[0]}" if words and words[0] in VERBS else "nshandoff"
    assert result.err.startswith(f"usage: {verb} ")
    assert re.match(rf"{verb}( check| show)?: ", result.err.splitlines()[-1])
    assert "handoff socket" not in result.err
    assert result.out == ""


def test_an_empty_path_is_refused_wherever_one_can_be_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verbs = cli.build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    places = [
        (verb, option)
        for verb, parser in verbs.items()  # type: ignore[union-attr]
        for action in parser._actions
        for option in action.option_strings
        if action.metavar in ("PATH", "DIR", "FILE") and verb != "verify"
    ]
    assert {verb for verb, _ in places} >= {"serve", "run", "exec", "request", "end", "list"}
    for verb, option in places:
        code = cli.main([verb, option, ""])
        assert code == (ExitCode.RUN_FAILED if verb in ("run", "exec") else ExitCode.USAGE)
        assert f"argument {option}: the path is empty" in capsys.readouterr().err
    for what in ("check", "show"):
        assert cli.main(["trace", what, ""]) == ExitCode.USAGE
        assert "the path is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--namespaces", "pid,pid", "--", "true"], "repeats Pid"),
        (["--namespaces", "pid"], "no command"),
        (["--namespaces", "pid", "--"], "no command"),
        (["--", "true"], "--namespaces"),
        (["--wrong"], "no option --wrong"),
        (["--namespaces", "pid", "--wrong", "true"], "no option --wrong"),
        (["--namespace", "pid", "--", "true"], "did you mean --namespaces?"),
        (["--namespaces", "pid", "--fallback", "nver", "--", "true"], "never"),
    ],
)
def test_run_keeps_even_usage_apart_from_what_a_command_exits_with(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *words]) == ExitCode.RUN_FAILED
    said = capsys.readouterr().err
    assert said.startswith("usage: nshandoff run ")
    assert says in said


def test_wrong_usage_of_the_demo_is_told_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--jsn"]) == ExitCode.USAGE
    assert capsys.readouterr().err.endswith("there is no option --jsn; did you mean --json?\n")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("run --namespaces pid -- a --id b -- c", "a --id b -- c"),
        ("run --namespaces pid a --id b -- c", "a --id b -- c"),
        ("run --namespaces pid -- -- c", "-- c"),
        ("run --namespaces pid a --namespace c", "a --namespace c"),
    ],
)
def test_words_of_the_command_are_left_alone(words: str, command: str) -> None:
    options = cli._parse(words.split())
    assert (options.command, options.id) == (command.split(), None)


def test_demo_gets_the_words_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = ModuleType("linux.demo.command")
    demo.main = len  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "linux.demo.command", demo)
    assert cli.main(["demo", "--help", "-x", "--", "y"]) == 4


# --- request and end ---------------------------------------------------------------------------

needs_root = pytest.mark.needs_root


@needs_root
def test_request_shows_what_the_linux_kernel_says(daemon: Daemon, allocation_id: str) -> None:
    words = ("--namespaces", "mount,pid", "--uenv", "hello.sqfs", "--socket", daemon.socket)
    with running("request", "--id", allocation_id, *words, "--json", "--end") as program:
        assert program.stdout is not None
        shown = json.loads(program.stdout.readline())
        assert shown["schema"] == 1
        assert shown["allocation_id"] == allocation_id
        assert shown["fd_types"] == ["Mount", "Pid"]
        assert shown["uenv_mount_path"] == f"{daemon.uenv_base}/hello"
        assert (shown["is_degraded"], shown["fallback"]) == (False, None)
        assert [one["type"] for one in shown["descriptors"]] == ["Mount", "Pid"]
        for one in shown["descriptors"]:
            status = Path(f"/proc/{program.pid}/fd/{one['fd']}").stat()
            assert (one["device"], one["inode"]) == (status.st_dev, status.st_ino)
        with daemon.obtain(allocation_id, MOUNT, PID, image="hello.sqfs") as handoff:
            ids = [identity.key[0] for identity in handoff.identities]
        assert [one["namespace_id"] for one in shown["descriptors"]] == ids
        program.send_signal(signal.SIGTERM)
        _, result = program.communicate()
    assert (program.returncode, result) == (0, f"nshandoff: {allocation_id} has ended\n")
    assert daemon.alive() == []


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_request_lets_go_and_leaves_the_allocation(
    daemon: Daemon, allocation_id: str, number: signal.Signals
) -> None:
    words = ("--id", allocation_id, "--namespaces", "pid", "--socket", daemon.socket)
    with running("request", *words) as program:
        assert program.stdout is not None
        assert allocation_id in program.stdout.readline()
        program.send_signal(number)
        _, result = program.communicate()
    assert program.returncode == 0
    assert "stays alive" in result
    assert daemon.alive() == [allocation_id]
    ended = nshandoff("end", allocation_id, "--socket", daemon.socket)
    assert (ended.returncode, ended.stderr) == (0, f"nshandoff: {allocation_id} has ended\n")
    assert daemon.alive() == []


@needs_root
def test_request_reports_the_end(daemon: Daemon, allocation_id: str) -> None:
    words = ("--id", allocation_id, "--namespaces", "net", "--socket", daemon.socket)
    with running("request", *words) as program:
        assert program.stdout is not None
        assert program.stdout.readline()
        daemon.consumer().end(allocation_id)
        _, result = program.communicate()
    assert (program.returncode, result) == (0, f"nshandoff: {allocation_id} has ended\n")


@needs_root
def test_request_that_is_refused_exits_with_no(daemon: Daemon, allocation_id: str) -> None:
    words = ("--namespaces", "mount", "--uenv", "absent.sqfs", "--socket", daemon.socket)
    result = nshandoff("request", "--id", allocation_id, *words)
    assert (result.returncode, result.stdout) == (ExitCode.NO, "")
    assert "CreationFailed: " in result.stderr
    assert "no such image" in result.stderr


@needs_root
def test_request_without_a_provider_serves_itself_and_says_so(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    socket = ("--socket", tmp_path / "absent.sock")
    words = ("--id", allocation_id, "--namespaces", "pid,mount", "--json", *socket)
    with running("request", *words) as program:
        assert program.stdout is not None
        shown = json.loads(program.stdout.readline())
        assert shown["is_degraded"] is True
        assert "does not exist" in shown["fallback"]
        assert set(identities_of(shown)) == {"Pid", "Mount"}
        program.send_signal(signal.SIGTERM)
        _, result = program.communicate()
    assert "namespace.handoff_failed" in result
    assert "ends now" in result


def test_refused_fallback_exits_with_unavailable(tmp_path: Path, allocation_id: str) -> None:
    socket = ("--socket", tmp_path / "absent.sock", "--fallback", "never")
    result = nshandoff("request", "--id", allocation_id, "--namespaces", "pid", *socket)
    assert (result.returncode, result.stdout) == (ExitCode.UNAVAILABLE, "")
    assert "SocketUnavailable: " in result.stderr


def test_end_without_a_provider_is_unavailable_at_once(tmp_path: Path) -> None:
    result = nshandoff("end", "anything", "--socket", tmp_path / "absent.sock")
    assert (result.returncode, result.stdout) == (ExitCode.UNAVAILABLE, "")
    assert "does not exist" in result.stderr


@needs_root
def test_end_of_what_is_not_known_is_no(daemon: Daemon, allocation_id: str) -> None:
    result = nshandoff("end", allocation_id, "--socket", daemon.socket)
    assert result.returncode == ExitCode.NO
    assert result.stderr == (
        f"nshandoff: AllocationNotFound: allocation not found: {allocation_id}\n"
    )


@needs_root
def test_interrupted_request_is_over_at_once(tmp_path: Path, allocation_id: str) -> None:
    socket = tmp_path / "silent.sock"
    with endpoint.listen(socket) as listener:
        words = ("--id", allocation_id, "--namespaces", "pid", "--socket", socket)
        with running("request", *words) as program:
            connections = []
            wait_until(lambda: connections.append(listener.accept()) or connections[-1])
            program.send_signal(signal.SIGINT)
            assert program.wait() == 130
        assert connections[-1] is not None
        connections[-1].close()


# --- Standard streams --------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(
    "words", ["list", "list --json", "doctor", "request --end", "--help", "list -h"]
)
def test_output_that_cannot_be_written_is_no_success_and_no_traceback(
    daemon: Daemon, allocation_id: str, words: str
) -> None:
    """And an allocation that was to be ended has ended."""
    asked = ("--id", allocation_id, "--namespaces", "net", "--socket", daemon.socket)
    state = ("--state-dir", daemon.state_dir) if words in ("list", "list --json", "doctor") else ()
    more = asked if words.startswith("request") else state
    with (
        Path("/dev/full").open("w") as full,
        running(*words.split(), *more, stdout=full) as program,
    ):
        _, errors = program.communicate(timeout=DEADLINE_S)
    assert program.returncode == ExitCode.ENVIRONMENT
    assert errors.endswith("nshandoff: standard output: No space left on device\n")
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert allocation_id not in daemon.alive()


@needs_root
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("run", "--namespaces", "net", "--", "sh", "-c", "exit 7"), 7),
        (("run", "--namespaces", "net", "--", "no-such-command"), ExitCode.NOT_FOUND),
        (("end", "unknown"), ExitCode.UNAVAILABLE),
    ],
)
def test_errors_that_cannot_be_written_change_no_exit_code(
    tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    """What is run warns that there is no provider."""
    verb, *rest = words
    with (
        Path("/dev/full").open("w") as full,
        running(verb, "--socket", tmp_path / "absent", *rest, stderr=full) as program,
    ):
        assert program.wait(DEADLINE_S) == code


def test_verbs_whose_output_may_be_cut_leave_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGPIPE)
    for verb in (("list",), ("doctor",)):
        cli.main([*verb, "--state-dir", str(tmp_path)])
        assert signal.getsignal(signal.SIGPIPE) == before
    cli.main(["trace", "show", str(tmp_path)])
    assert signal.getsignal(signal.SIGPIPE) == before
