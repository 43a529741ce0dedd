"""Isolate the tool from the settings of who started it, and keep those for the command of `run`.

Variables of an interpreter or of the dynamic linker (PYTHONPATH, LD_LIBRARY_PATH) are meant for a
job, and so is all else that survives exec(2). The tool runs without them: the installed
`nshandoff`, a script for sh, starts Python in isolated mode; `python -m linux` executes itself once
more in that mode. Both hand on what they had in variables of their own, not in arguments, which
every user of a node can read.

Imports next to nothing: it runs before everything else, also before `--help`.
"""

from __future__ import annotations

import os
import sys
from typing import Final, NamedTuple, NoReturn

IGNORED: Final = "NSHANDOFF_IGNORED"
"""Variable: the mask of ignored signals that sh had, the `SigIgn` of /proc/PID/status. It also
says that this interpreter is isolated."""

ENVIRONMENT: Final = "NSHANDOFF_ENVIRONMENT_"
"""Variables that begin so, numbered from 1: /proc/PID/environ, in hexadecimal."""

PART_BYTES: Final = 32768
"""How much of it is in one variable; the Linux kernel takes 128 KiB in one."""

PYTHONS_OWN: Final = 1 << (13 - 1) | 1 << (25 - 1)
"""SIGPIPE and SIGXFSZ, which a Python ignores from its start: how they were, only sh knows. Of the
others it does not, because it may ignore them itself (bash SIGQUIT), until it executes a Python."""

NOT_FOR_US: Final = (
    b"PYTHON",
    b"LD_",
    b"MALLOC_",
    *(b"GCONV_PATH", b"GETCONF_DIR", b"GLIBC_TUNABLES", b"HOSTALIASES", b"LOCALDOMAIN", b"LOCPATH"),
    *(b"NIS_PATH", b"NLSPATH", b"RESOLV_HOST_CONF", b"RES_OPTIONS", b"TZDIR"),
)
"""How variables begin that neither the tool nor a process of its own gets: those of Python, and
those that the C library ignores in a set-user-ID program (ld.so(8)), but for TMPDIR."""

_PROGRAM: Final = (
    "import sys; path = sys.argv.pop(1); path in sys.path or sys.path.insert(0, path);"
    "from linux.__main__ import start; raise SystemExit(start())"
)


class Launch(NamedTuple):
    """What this process had when it was executed."""

    environment: tuple[bytes, ...]
    """`NAME=VALUE` each, in their order."""
    descriptors: tuple[int, ...]
    """What was open, without the standard streams; borrowed."""
    ignored: int
    """The mask of ignored signals."""
    streams: tuple[int, ...]
    """Standard streams that the tool does not need once a command has them; borrowed."""


_launch: Launch | None = None


def launch() -> Launch:
    """Return what this process had; what it has now, if it is not the command `nshandoff`."""
    return _launch or Launch(_entries_of(os.environb), (), _ignored_now() & ~PYTHONS_OWN, ())


def is_isolated() -> bool:
    """Say whether this interpreter was started for the tool, without settings of the caller."""
    return bool(sys.flags.isolated) and IGNORED in os.environ


def isolate(packages: str) -> NoReturn:
    """
    Execute this program anew in an isolated interpreter.

    Args:
        packages: The directory that `linux` was imported from.

    Raises:
        OSError: /proc is missing, or the environment is too large to be handed on.
    """
    with open("/proc/self/environ", "rb") as file:
        content = file.read()
    parts = [content[at : at + PART_BYTES] for at in range(0, len(content), PART_BYTES)]
    variables = {IGNORED: "0"}
    for number, part in enumerate(parts, 1):
        variables[f"{ENVIRONMENT}{number}"] = part.hex()
    options = ["-I", "-X", "utf8", *(["-S"] if sys.flags.no_site else [])]
    command = [sys.executable, *options, "-c", _PROGRAM, packages, *sys.argv[1:]]
    os.execve(sys.executable, command, variables)


def take_over() -> None:
    """Note what this process had, and clean its environment. Closed streams get /dev/null."""
    # Keeps RUN-5.
    global _launch
    descriptors = _open_descriptors()
    _plug_streams()
    parts: list[bytes] = []
    while (part := os.environ.get(f"{ENVIRONMENT}{len(parts) + 1}")) is not None:
        parts.append(bytes.fromhex(part))
    environment = tuple(b"".join(parts).split(b"\0")[:-1])
    ignored = int(os.environ[IGNORED], 16) & PYTHONS_OWN | _ignored_now() & ~PYTHONS_OWN
    _launch = Launch(environment, descriptors, ignored, (0, 1))
    os.environ.clear()
    for entry in environment:
        name, _, value = entry.partition(b"=")
        if name and not name.startswith(NOT_FOR_US):
            os.environb.setdefault(name, value)  # as getenv(3): the first one counts


def _open_descriptors() -> tuple[int, ...]:
    found = []
    for number in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            if number > 2 and os.get_inheritable(number):
                found.append(number)
        except OSError:
            pass  # the one for this list
    return tuple(found)


def _plug_streams() -> None:
    """Occupy the numbers of closed standard streams; the command has them closed again."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, close-on-exec
    # Without them print() would write to the next best.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _entries_of(variables: os._Environ[bytes]) -> tuple[bytes, ...]:
    return tuple(name + b"=" + value for name, value in variables.items())


def _ignored_now() -> int:
    with open("/proc/self/status", "rb") as file:
        (mask,) = (line.split()[1] for line in file if line.startswith(b"SigIgn:"))
    return int(mask, 16)
