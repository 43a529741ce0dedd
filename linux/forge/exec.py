"""Enter a cgroup and then execute a command: run by `spawn` in the allocation's namespaces.

`python -I -S -B exec.py STATUS PLAN SCOPE` enters the scope and becomes the command, so that the
command is in its scope from its first instruction. It imports nothing of ours: it starts fast, and
works in any mount namespace that has a Python. Its own environment is empty, because variables of
an interpreter or of the dynamic linker are meant for the command.

The alternative, the `preexec_fn` of `subprocess`, forks the whole caller, however large, and runs
Python in a fork of a process with threads, which Python warns about.

Arguments, all of them numbers of descriptors:
    STATUS  a pipe. `READY` is written to it just before the exec; on failure, before or after
            that, `phase NUL errno NUL path`. It closes with the exec. Nothing at all before it
            closes means that this helper died.
    PLAN    a pipe: what to do, until its end, as `spawn.Plan` writes it.
    SCOPE   the `cgroup.procs` to enter; -1 for none.
"""

from __future__ import annotations

# What `signal` gets its functions from: its enums would be a third of this program's time.
import _signal as signal  # type: ignore[import-not-found]
import errno
import os
import sys

READY = b"ready\n"
"""Said before the exec. If nothing follows, the command runs."""

EXIT_NOT_STARTED = 127
"""As a shell exits if there is no such command; only our parent sees it."""

SHELL = b"/bin/sh"
"""What executes a file that has no format the Linux kernel knows (execvp(3))."""

DEFAULT_PATH = b"/bin:/usr/bin"
"""Where a command is looked for if its environment has no PATH, as in glibc."""

NOT_HERE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.ENODEV, errno.ETIMEDOUT)
"""With these a search in PATH goes on, as in glibc."""


class Variables:
    """
    An environment for execve(2) in its own order, with names that occur twice.

    Python takes it as a mapping. An entry with no `=` behind its first byte cannot be given: Python
    adds the `=` itself and refuses an empty name. It is left out.
    """

    def __init__(self, entries: list[bytes]) -> None:
        cuts = [(entry, entry.find(b"=", 1)) for entry in entries]
        self.names = [entry[:cut] for entry, cut in cuts if cut > 0]
        self._values = [entry[cut + 1 :] for entry, cut in cuts if cut > 0]

    def keys(self) -> list[bytes]:
        """Return the names."""
        return self.names

    def values(self) -> list[bytes]:
        """Return the values, in the same order."""
        return self._values

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: bytes) -> bytes:
        return self._values[self.names.index(name)]


def read_plan(pipe: int) -> list[bytes]:
    """Read the plan to its end."""
    parts = []
    while part := os.read(pipe, 1 << 16):
        parts.append(part)
    return b"".join(parts).split(b"\0")[:-1]


def enter_scope(scope: int) -> None:
    """Move this process into the cgroup."""
    # Keeps NODE-5.
    os.write(scope, b"0")


def enter_directory(path: bytes, identity: bytes) -> bool:
    """Enter the working directory; say whether it is the one with this device and inode."""
    # Keeps RUN-3.
    if path:
        os.chdir(path)
    if not identity:
        return True
    status = os.lstat(b".")
    return identity == b"%d:%d" % (status.st_dev, status.st_ino)


def set_signals(ignored: list[int], blocked: list[int], pending: list[int]) -> None:
    """Give every signal its disposition, block some, and send those that were pending."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    # What came while this was not the command yet, was for the caller.
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for one in pending:
        os.kill(os.getpid(), one)


def set_timers(timers: list[bytes]) -> None:
    """Continue the caller's interval timers: `which:remaining:interval` each."""
    for timer in timers:
        which, remaining, interval = timer.split(b":")
        signal.setitimer(int(which), float(remaining), float(interval))


def execute(command: list[bytes], variables: Variables) -> None:
    """
    Execute a command as execvp(3) does.

    Raises:
        OSError: it cannot be executed.
    """
    is_denied = False
    for candidate in candidates(command[0], variables):
        try:
            os.execve(candidate, command, variables)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve(SHELL, [SHELL, candidate, *command[1:]], variables)  # type: ignore[arg-type]
            if b"/" in command[0] or error.errno not in (errno.EACCES, *NOT_HERE):
                raise
            is_denied |= error.errno == errno.EACCES
    number = errno.EACCES if is_denied else errno.ENOENT
    raise OSError(number, os.strerror(number))


def candidates(name: bytes, variables: Variables) -> list[bytes]:
    """Say where a command may be, in the order in which it is looked for."""
    if not name:
        return []
    if b"/" in name:
        return [name]
    path = variables[b"PATH"] if b"PATH" in variables.names else DEFAULT_PATH
    return [directory + b"/" + name if directory else name for directory in path.split(b":")]


def main() -> None:
    """Do all of this in order, and become the command."""
    status, plan, scope = map(int, sys.argv[1:4])
    phase, path = "prepare", b""
    try:
        for fd in {status, plan, scope} - {-1}:
            os.set_inheritable(fd, False)
        settings, directory, identity, *words = read_plan(plan)
        count, *numbers = settings.split(b";")
        ignored, blocked, pending, timers = ([n for n in x.split(b",") if n] for x in numbers)
        command = words[: int(count)]
        if scope >= 0:
            phase, path = "scope", b"cgroup.procs"
            enter_scope(scope)
        phase, path = "identity" if identity else "directory", directory
        if not enter_directory(directory, identity):
            raise OSError(errno.ESTALE, "")
        phase, path = "prepare", b""
        set_signals([*map(int, ignored)], [*map(int, blocked)], [*map(int, pending)])
        set_timers(timers)
        phase, path = "exec", command[0]
        os.write(status, READY)
        execute(command, Variables(words[int(count) :]))
    except OSError as error:
        os.write(status, b"%s\0%d\0%s" % (phase.encode(), error.errno or 0, path))
        os._exit(EXIT_NOT_STARTED)
    except BaseException:
        os.write(status, b"died\x000\x00")  # also after READY
        raise


if __name__ == "__main__":
    main()
