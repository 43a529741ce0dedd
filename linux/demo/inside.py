"""The program that the demonstration runs inside an allocation, to see what a process sees there.

`python -I -S inside.py [IMAGE_FOLDER]`. It imports nothing of ours, and learns everything about its
namespaces from the Linux kernel. Each line on standard input is a question, answered with one line
of JSON; at the end of the input it exits.

    look          everything that it can see
    parent PID    the parent of another process
    gone PID      whether a process vanishes, as it does when it has ended and was reaped
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import struct
import sys
from pathlib import Path
from typing import Final

LOOKS_MAX: Final = 1000
"""How often to look whether a process has vanished."""

PAUSE_MS: Final = 5
"""Pause between two looks."""

IMAGE_FILE: Final = "hello.txt"
"""The file in the demonstration's image."""

_SIOCGIFFLAGS: Final = 0x8913
_IFREQ: Final = struct.Struct("16sh22x")
_IFF_UP: Final = 0x1


def look(image: Path | None) -> dict[str, object]:
    """Return everything that can be seen."""
    return {
        "pid": os.getpid(),
        "init": _comm(1),
        "pids": sorted(int(name.name) for name in Path("/proc").iterdir() if name.name.isdigit()),
        "interfaces": [_interface(name) for _, name in socket.if_nameindex()],
        "loopback": _talk_over_loopback(),
        "image": None if image is None else _look_at_image(image),
    }


def parent_of(pid: int) -> int:
    """Return the parent of another process."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[1])


def is_gone(pid: int) -> bool:
    """Say whether a process vanishes; a zombie does not."""
    for _ in range(LOOKS_MAX):
        if not Path(f"/proc/{pid}").exists():
            return True
        select.poll().poll(PAUSE_MS)
    return False


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()


def _interface(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0))
    _, flags = _IFREQ.unpack(answer)
    return f"{name} {'up' if flags & _IFF_UP else 'down'}"


def _talk_over_loopback() -> str:
    """Connect to ourselves; return what arrived, or the error."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=5) as caller:
                caller.sendall(b"heard")
            with server.accept()[0] as called:
                return called.recv(64).decode("ascii")
    except OSError as error:
        return _name(error)


def _look_at_image(folder: Path) -> dict[str, object]:
    device = folder.stat().st_dev
    return {
        "text": _read(folder / IMAGE_FILE),
        "write": _try_to_write(folder / IMAGE_FILE),
        "create": _try_to_write(folder / "new"),
        "device": f"{os.major(device)}:{os.minor(device)}",
        "options": _options(folder),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        return _name(error)


def _try_to_write(path: Path) -> str:
    try:
        path.open("a").close()
    except OSError as error:
        return _name(error)
    return "written"


def _options(folder: Path) -> list[str]:
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[4] == str(folder):
            return fields[5].split(",")
    return []


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


def main() -> None:
    """Answer questions until there are no more."""
    image = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for line in sys.stdin:
        answer: object
        match line.split():
            case ["parent", pid]:
                answer = parent_of(int(pid))
            case ["gone", pid]:
                answer = is_gone(int(pid))
            case _:
                answer = look(image)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
