"""How does a command come to be in its scope before its first instruction?

This file is executed by `spawn`, in the allocation's namespaces and in the place of the
command, which it then becomes: `python -I -S exec.py STATUS ENVIRONMENT SCOPE TTY COMMAND..`.
It imports nothing of ours, because it should start fast and find all it needs in any mount
namespace that has a Python.

The alternative, `subprocess`' `preexec_fn`, forks the whole caller, however large, and runs Python
in a fork of a process with threads, which Python warns about.

Arguments, all but the last of them numbers:
    STATUS       a descriptor: on failure `stage NUL errno NUL path` is written to it. It closes
                 with the exec, so that its end says that the command runs.
    ENVIRONMENT  a descriptor: a file with the command's environment, `NAME=VALUE NUL` each. Not
                 this interpreter's own: a command's LD_LIBRARY_PATH need not suit a Python.
    SCOPE        a descriptor: the `cgroup.procs` to enter; -1 for none.
    TTY          a descriptor: the terminal to come to the foreground of; -1 for none.
"""

from __future__ import annotations

import os
import signal
import sys

EXIT_NOT_STARTED = 127
"""What a shell exits with if there is no such command; nobody but our parent sees it."""


def enter_scope(scope: int) -> None:
    """Move this process into the cgroup; what it becomes is in there from its first instruction."""
    # Keeps NODE-5.
    os.write(scope, b"0")


def come_to_foreground(tty: int) -> None:
    """Make this process' group the one that the terminal talks to."""
    # A process in the background that does this is stopped, unless it ignores SIGTTOU.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(tty, os.getpgrp())


def reset_signals() -> None:
    """Give every signal its default disposition, and block none: neither is undone by an exec."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def read_environment(file: int) -> dict[bytes, bytes]:
    """Read the command's environment."""
    content = os.pread(file, os.fstat(file).st_size, 0)
    pairs = (variable.partition(b"=") for variable in content.split(b"\0")[:-1])
    return {name: value for name, _, value in pairs}


def main() -> None:
    """Do all of it, in order, and become the command."""
    status, environment, scope, tty = map(int, sys.argv[1:5])
    command = sys.argv[5:]
    stage, path = "prepare", ""
    for fd in {status, environment, scope} - {-1}:
        os.set_inheritable(fd, False)
    try:
        if scope >= 0:
            stage, path = "scope", "cgroup.procs"
            enter_scope(scope)
        if tty >= 0:
            stage, path = "foreground", "terminal"
            come_to_foreground(tty)
        stage, path = "prepare", ""
        variables = read_environment(environment)
        reset_signals()
        stage, path = "exec", command[0]
        os.execvpe(command[0], command, variables)
    except OSError as error:
        report = f"{stage}\0{error.errno}\0{path}"
        os.write(status, report.encode("utf-8", "surrogateescape"))
        os._exit(EXIT_NOT_STARTED)


if __name__ == "__main__":
    main()
