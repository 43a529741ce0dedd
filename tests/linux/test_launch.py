"""The tool runs without the settings of who starts it, which its command keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from linux.cli.exits import ExitCode
from tests.support.programs import COMMAND, INSTALLED, ROOT, environment, running

WAYS = pytest.mark.parametrize("command", [(INSTALLED,), COMMAND], ids=["installed", "module"])


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Settings under which no Python starts, or one that does something else."""
    (tmp_path / "startup.py").write_text("raise SystemExit('startup')")
    for package in ("transport", "statemachine", "msgpack", "argparse"):
        (tmp_path / f"{package}.py").write_text(f"raise SystemExit('{package}')")
    for library in ("libm.so.6", "libz.so.1", "libexpat.so.1"):
        (tmp_path / library).write_text("no library")
    return environment(
        PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}",
        PYTHONSTARTUP=str(tmp_path / "startup.py"),
        PYTHONINSPECT="1",
        PYTHONWARNINGS="error",
        GCONV_PATH=str(tmp_path),
        MALLOC_PERTURB_="85",
    )


def run(command: tuple[str, ...], *words: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False, **how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.clause("RUN-5")
@WAYS
def test_basic_settings_of_python_do_nothing_to_the_tool(
    command: tuple[str, ...], settings: dict[str, str]
) -> None:
    result = run(command, "end", "x", "--socket", "/nowhere/socket", env=settings)
    assert result.returncode == ExitCode.UNAVAILABLE
    assert result.stderr.startswith("nshandoff: SocketUnavailable: ")
    assert (result.stderr.count("\n"), result.stdout) == (1, "")


@pytest.mark.clause("RUN-5")
def test_the_installed_command_needs_nothing_of_them(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """Under these no `python -m` reaches its first line."""
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('sitecustomize')")
    more = {"PYTHONHOME": "/nowhere", "LD_LIBRARY_PATH": str(tmp_path), "IFS": "/n", "ENV": "/x"}
    result = run((INSTALLED,), "--version", env={**settings, **more})
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("nshandoff ")


@pytest.mark.needs_root
@WAYS
def test_the_command_of_run_keeps_them_all(
    command: tuple[str, ...], settings: dict[str, str], allocation_id: str
) -> None:
    words = ("--id", allocation_id, "--namespaces", "", "--socket", "/nowhere", "--", "env", "-0")
    result = run(command, "run", *words, env=settings)
    assert result.returncode == 0
    assert dict(x.split("=", 1) for x in result.stdout.split("\0")[:-1]) == settings


@WAYS
def test_no_secret_is_among_the_arguments_which_everyone_can_read(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    words = ("serve", "--backend", "simulated", "--socket", "s", "--state-dir", "state")
    env = environment(SECRET="the secret")
    with running(*words, command=command, cwd=tmp_path, env=env) as program:
        assert program.stderr is not None
        program.stderr.readline()
        shown = Path(f"/proc/{program.pid}/cmdline").read_bytes()
        assert b"serve" in shown
        for form in ("the secret", b"the secret".hex(), b"the secret".hex(" ")):
            assert form.encode() not in shown
        program.terminate()


@WAYS
def test_streams_that_are_closed_are_taken_for_nothing_else(command: tuple[str, ...]) -> None:
    words = 'exec "$@" 2>&-; exit 1'
    end = ("end", "x", "--socket", "/nowhere/socket")
    result = run(("sh", "-c", words, "sh", *command), *end, env=environment())
    assert (result.returncode, result.stdout) == (ExitCode.UNAVAILABLE, "")
    closed = 'exec "$@" <&- >&- 2>&-; exit 1'
    assert run(("sh", "-c", closed, "sh", *command), "--version", env=environment()).returncode == 0


def test_an_environment_that_cannot_be_handed_on_is_no_exit_code_of_a_command() -> None:
    large = {f"V{number}": "x" * 100_000 for number in range(12)}
    words = ("run", "--namespaces", "", "--", "true")
    result = run((INSTALLED,), *words, env=environment(**large))
    assert result.returncode == ExitCode.RUN_FAILED
    assert result.stderr != ""
    assert run((INSTALLED,), "list", env=environment(**large)).returncode == ExitCode.ENVIRONMENT


@pytest.mark.needs_root
@pytest.mark.parametrize("sh", ["dash", "bash"])
def test_shell_that_cannot_fork_is_no_exit_code_of_a_command(sh: str) -> None:
    """The next child of a process whose PID namespace has lost its init cannot be made."""
    lost = ("unshare", "--pid", "sh", "-c", '/bin/true; exec "$@"', "sh")
    words = (sh, "-p", INSTALLED, "run", "--namespaces", "", "--", "true")
    result = run((*lost, *words), env=environment())
    assert result.returncode == ExitCode.RUN_FAILED, result.stderr
    assert "fork" in result.stderr


def test_script_without_its_interpreter_says_so(tmp_path: Path) -> None:
    script = tmp_path / "nshandoff"
    script.write_bytes(Path(INSTALLED).read_bytes())
    script.chmod(0o755)
    result = run((str(script),), "run", "--namespaces", "", "--", "true")
    assert result.returncode == ExitCode.RUN_FAILED
    assert result.stderr.startswith(f"nshandoff: there is no python in {tmp_path}; ")
    link = tmp_path / "link"
    link.symlink_to(INSTALLED)
    assert run((str(link),), "--version").returncode == 0


@pytest.mark.needs_root
@WAYS
def test_without_proc_it_says_so(command: tuple[str, ...]) -> None:
    words = ("unshare", "--mount", "sh", "-c", 'umount -l /proc; exec "$@"', "sh", *command)
    result = run(words, "run", "--namespaces", "", "--", "true", env=environment())
    assert result.returncode == ExitCode.RUN_FAILED
    assert "/proc" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_starts_the_tool_in_another_way_is_what_it_has_itself() -> None:
    program = "from linux.launch import launch; print(launch().environment)"
    result = run((sys.executable, "-c", program), env={"PYTHONPATH": str(ROOT), "A": "1"})
    assert "b'A=1'" in result.stdout
