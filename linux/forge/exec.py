"""Enter a cgroup and then execute a command: run by `spawn` in the allocation's namespaces.

`python -I -S exec.py STATUS ENVIRONMENT SCOPE TTY COMMAND..` enters the scope and becomes the
command, so that the command is in its scope from its first instruction. It imports nothing of ours:
it starts fast, and works in any mount namespace that has a Python.

The alternative, the `preexec_fn` of `subprocess`, forks the whole caller, however large, and runs
Python in a fork of a process with threads, which Python warns about.

Arguments, all but the last of them numbers:
    STATUS       a descriptor: on failure `phase NUL errno NUL path` is written to it. It closes
                 with the exec, and that says that the command runs.
    ENVIRONMENT  a descriptor: a file with the command's environment, `NAME=VALUE NUL` each. Not
                 this interpreter's, which may not work with a command's LD_LIBRARY_PATH.
    SCOPE        a descriptor: the `cgroup.procs` to enter; -1 for none.
    TTY          a descriptor: the terminal to come to the foreground of; -1 for none.
"""

from __future__ import annotations

import os
import signal
import sys

EXIT_NOT_STARTED = 127
"""As a shell exits if there is no such command; only our parent sees it."""


def enter_scope(scope: int) -> None:
    """Move this process into the cgroup."""
    # Keeps NODE-5.
    os.write(scope, b"0")


def come_to_foreground(tty: int) -> None:
    """Make this process' group the foreground group of the terminal."""
    # A background process that does this is stopped, unless it ignores SIGTTOU.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(tty, os.getpgrp())


def reset_signals() -> None:
    """Give every signal its default disposition, and block none; an exec does neither."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def read_environment(file: int) -> dict[bytes, bytes]:
    """Read the command's environment."""
    content = os.pread(file, os.fstat(file).st_size, 0)
    pairs = (variable.partition(b"=") for variable in content.split(b"\0")[:-1])
    return {name: value for name, _, value in pairs}


def main() -> None:
    """Do all of this in order, and become the command."""
    status, environment, scope, tty = map(int, sys.argv[1:5])
    command = sys.argv[5:]
    phase, path = "prepare", ""
    for fd in {status, environment, scope} - {-1}:
        os.set_inheritable(fd, False)
    try:
        if scope >= 0:
            phase, path = "scope", "cgroup.procs"
            enter_scope(scope)
        if tty >= 0:
            phase, path = "foreground", "terminal"
            come_to_foreground(tty)
        phase, path = "prepare", ""
        variables = read_environment(environment)
        reset_signals()
        phase, path = "exec", command[0]
        os.execvpe(command[0], command, variables)
    except OSError as error:
        report = f"{phase}\0{error.errno}\0{path}"
        os.write(status, report.encode("utf-8", "surrogateescape"))
        os._exit(EXIT_NOT_STARTED)


if __name__ == "__main__":
    main()
