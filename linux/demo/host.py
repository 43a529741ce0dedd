"""What the demonstration can show on this machine as this user, and how it does so without root.

As root everything. Without root it moves into a user namespace of its own, where it is root over
new namespaces and nothing else: they are as real, and what the Linux kernel does not allow there is
listed. Where that is not allowed either, the node is simulated.

Each thing that is missing is found by trying it, not by the user id.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from transport.descriptors import Descriptor, DescriptorBundle

from .. import syscalls
from ..cgroups import CgroupUnavailable, find_cgroup2
from ..features import Features
from ..forge.spawn import spawn_within
from ..mounts import ImageError, ImageStore
from ..root import CHROOT, is_chroot
from ..syscalls import SyscallError
from .inside import IMAGE_FILE

PREFIX: Final = "nshandoff-demo-"
"""Prefix of the private folder's name, which is the prefix of the allocations' names."""

IMAGE: Final = "hello.sqfs"
"""The image that both allocations use."""

IMAGE_TEXT: Final = "hello from the image"
"""The text in its only file."""

OUTSIDE_VARIABLE: Final = "NSHANDOFF_DEMO_OUTSIDE"
"""Set in the demonstration's own user namespace, to the user id that started it outside."""

UNSHARE: Final = (
    "unshare",
    *("--user", "--map-root-user", "--mount", "--pid", "--net", "--cgroup"),
    *("--fork", "--mount-proc", "--kill-child", "--"),
)
"""Makes a user root over new namespaces, and nothing else (unshare(1)). All of them are new because
the forge returns to its own after every anchor, and may only enter those of its user namespace."""

_CAP_SYS_ADMIN: Final = 21
_INITIAL_UID_MAP: Final = ["0", "0", "4294967295"]
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])

_NO_IMAGE_WITHOUT_ROOT: Final = "squashfs is mounted only for the machine's root"
_NO_SCOPE_WITHOUT_ROOT: Final = (
    "this user may write to no cgroup v2, so nothing ends by its cgroup emptying; "
    "the first allocation ends with its init instead"
)
_NO_SCOPE: Final = "so the first allocation ends with its init, not by its cgroup emptying"


class CannotShow(Exception):
    """This machine, or this user on it, cannot show what was requested."""


@dataclass(frozen=True, slots=True)
class Host:
    """What the demonstration has on this machine."""

    folder: Path
    """Private and temporary."""
    is_simulated: bool = False
    cgroup2: Path | None = None
    """Where scopes are made; None without scopes."""
    image: str | None = None
    """What both allocations request; None without an image."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """What cannot be shown, with the reason."""

    @property
    def socket(self) -> Path:
        """The provider's socket."""
        return self.folder / "handoff.sock"

    @property
    def state_dir(self) -> Path:
        """The provider's journal."""
        return self.folder / "state"

    @property
    def image_root(self) -> Path:
        """Where the image is."""
        return self.folder / "images"

    @property
    def uenv_base(self) -> Path:
        """Where it appears inside an allocation."""
        return self.folder / "uenv"

    def close(self) -> None:
        """Undo what was mounted for it; the caller removes the folder."""
        if self.cgroup2 is not None and self.cgroup2.is_relative_to(self.folder):
            syscalls.umount2(self.cgroup2)


def is_root_here() -> bool:
    """Say whether this process may make namespaces and return from them."""
    is_ours = OUTSIDE_VARIABLE in os.environ
    return _has_capability(_CAP_SYS_ADMIN) and (is_ours or _is_in_initial_user_namespace())


def why_no_user_namespace() -> str | None:
    """Try to make a user namespace with all that is needed in it; None if that works."""
    answer, question = map(Descriptor, os.pipe())
    with answer, question:
        try:
            child = spawn_within(
                [*UNSHARE, "true"], _nothing(), stdout=question.fileno(), stderr=question.fileno()
            )
        except OSError as error:
            return f"{UNSHARE[0]}: {error.strerror}"
        question.close()
        output = _read_all(answer)
        return None if child.wait() == 0 else output.strip() or f"{UNSHARE[0]} failed"


def enter_user_namespace(arguments: list[str]) -> NoReturn:
    """Execute the same demonstration in a user namespace of its own."""
    environment = {**environment_for_us(), OUTSIDE_VARIABLE: str(os.geteuid())}
    command = [*UNSHARE, sys.executable, "-P", "-m", "linux", "demo", *arguments]
    os.execvpe(command[0], command, environment)


def environment_for_us() -> dict[str, str]:
    """Return our environment, with a PYTHONPATH that leads to these packages."""
    paths = [_PACKAGES, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def refuse_chroot() -> None:
    """Raise `CannotShow` in a chroot: there a mount namespace shows other files than ours."""
    if is_chroot():
        raise CannotShow(f"{CHROOT}; or see it simulated: demo --backend simulated")


def simulated_host(folder: Path, why: str | None) -> Host:
    """Prepare a node that exists only in this program."""
    missing = {"namespaces": why} if why else {}
    inside = "a simulated namespace has no inside"
    return Host(
        folder, is_simulated=True, image=IMAGE, missing={**missing, "a process in them": inside}
    )


def real_host(folder: Path, clock: Callable[[], float]) -> Host:
    """
    Prepare this node.

    Args:
        folder: Private; images, sockets and the journal will be in there.
        clock: Monotonic seconds.
    """
    missing: dict[str, str] = {}
    host = Host(folder)
    for path in (host.image_root, host.uenv_base):
        path.mkdir()
    cgroup2 = _find_scopes(folder, missing)
    image = _make_image(host, clock, missing)
    return Host(folder, cgroup2=cgroup2, image=image, missing=missing)


# --- cgroups ----------------------------------------------------------------------------------


def _find_scopes(folder: Path, missing: dict[str, str]) -> Path | None:
    if OUTSIDE_VARIABLE in os.environ:
        cgroup2 = _delegated_cgroup(folder)
        if cgroup2 is None:
            missing["scopes"] = _NO_SCOPE_WITHOUT_ROOT
        return cgroup2
    try:
        return find_cgroup2()
    except CgroupUnavailable as error:
        missing["scopes"] = f"{error}; {_NO_SCOPE}"
        return None


def _delegated_cgroup(folder: Path) -> Path | None:
    """Mount the part of the cgroup tree that this user may write to, if there is one."""
    _protect_cgroups()
    root = folder / "cgroup"
    root.mkdir()
    try:
        syscalls.mount("cgroup2", root, "cgroup2", 0)
    except SyscallError:
        return None
    if os.access(root, os.W_OK) and os.access(root / "cgroup.procs", os.W_OK):
        return root
    syscalls.umount2(root)
    return None


def _protect_cgroups() -> None:
    """Make the machine's cgroup mounts read-only for us: what is found writable is ours then."""
    while True:
        try:
            root = find_cgroup2()
        except CgroupUnavailable:
            return
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        readonly = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY
        syscalls.mount(None, root, None, readonly | flags)


# --- the image --------------------------------------------------------------------------------


def _make_image(host: Host, clock: Callable[[], float], missing: dict[str, str]) -> str | None:
    if OUTSIDE_VARIABLE in os.environ:
        missing["the image"] = f"{_NO_IMAGE_WITHOUT_ROOT} ({_try_squashfs()})"
        return None
    program = shutil.which("mksquashfs")
    if program is None:
        missing["the image"] = "there is no mksquashfs (package squashfs-tools) to make one with"
        return None
    _run_mksquashfs(program, host)
    store = ImageStore(host.image_root, 0.0, clock, Features.probe())
    with store:
        try:
            store.acquire(IMAGE, "demonstration").close()
        except ImageError as error:
            missing["the image"] = str(error)
            return None
    return IMAGE


def _run_mksquashfs(program: str, host: Host) -> None:
    tree = host.folder / "tree"
    tree.mkdir()
    (tree / IMAGE_FILE).write_text(f"{IMAGE_TEXT}\n", encoding="utf-8")
    options = ("-noappend", "-all-root", "-no-progress", "-quiet")
    answer, question = map(Descriptor, os.pipe())
    with answer, question:
        child = spawn_within(
            [program, str(tree), str(host.image_root / IMAGE), *options],
            _nothing(),
            stdout=question.fileno(),
            stderr=question.fileno(),
        )
        question.close()
        output = _read_all(answer)
    if child.wait() != 0:
        raise CannotShow(f"mksquashfs: {output.strip()}")


def _try_squashfs() -> str:
    """Return the error of an attempt to mount squashfs here."""
    try:
        with syscalls.fsopen("squashfs") as context:
            syscalls.fsconfig_create(context)
    except SyscallError as error:
        return f"{error.call}: {error.name}"
    return "and a loop device is missing"


# --- small things -----------------------------------------------------------------------------


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _is_in_initial_user_namespace() -> bool:
    return Path("/proc/self/uid_map").read_text(encoding="ascii").split() == _INITIAL_UID_MAP


def _nothing() -> DescriptorBundle:
    """Return an empty bundle: a process that is started with it stays in our namespaces."""
    return DescriptorBundle((), ())


def _read_all(pipe: Descriptor) -> str:
    with open(pipe.fileno(), encoding="utf-8", errors="replace", closefd=False) as file:
        return file.read()
