"""A program that executes another one from an unusual state: `exec_stage.py SPEC COMMAND..`.

SPEC is JSON: `result` is the path of a file for the probe, `groups` whether groups may be set. All
that an exec keeps is set to something that is not the default, so that it would be missed.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import sys

from linux.forge.exec import Variables

RESULT_FD = 9
IGNORED = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGUSR1, signal.SIGRTMIN + 3)
BLOCKED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGWINCH, signal.SIGRTMIN + 1)
PENDING = (signal.SIGUSR2, signal.SIGRTMIN + 1)
TIMERS = ((signal.ITIMER_REAL, 1000.0, 7.0), (signal.ITIMER_PROF, 1000.0, 0.0))
ENVIRONMENT = (
    b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    b"BASH_FUNC_module%%=() {  echo module\n}",
    b"twice=1",
    b"\xff\xfe=\xfd\n",
    b"twice=2",
    b"empty=",
    b"=C:=odd",
    b"a name=with = signs",
    b"PYTHONPATH=/nowhere",
    b"PYTHONHOME=/nowhere",
    b"LD_LIBRARY_PATH=/nowhere",
    b"LANG=no_NO.SUCH",
    b"large=" + b"x" * 100_000,
)


IO_PRIORITY_SET = {"x86_64": 251, "aarch64": 30}
PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 29, 38, 41
ADDR_NO_RANDOMIZE = 0x0040000


def set_by_call() -> None:
    """What only system calls can set that Python does not have."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_TIMERSLACK, 12_345, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    libc.personality(ADDR_NO_RANDOMIZE)
    if number := IO_PRIORITY_SET.get(platform.machine()):
        libc.syscall(number, 1, 0, 2 << 13 | 6)


def main() -> None:
    spec = json.loads(sys.argv[1])
    os.dup2(os.open(spec["result"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), RESULT_FD)
    reading, writing = os.pipe()
    os.dup2(reading, 63)
    os.dup2(writing, 200)
    os.close(writing)  # close-on-exec: not to be seen
    os.umask(0o037)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 23, 1 << 24))
    os.nice(3)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if spec["is_root"]:
        os.setgroups([5, 4, 20])
    for name, value in (("oom_score_adj", "123"), ("coredump_filter", "0x1"), ("comm", "stage")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(value)
    set_by_call()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, BLOCKED)
    for number in PENDING:
        os.kill(os.getpid(), number)
    for timer in TIMERS:
        signal.setitimer(*timer)
    os.execve(sys.argv[2], sys.argv[2:], Variables(list(ENVIRONMENT)))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
