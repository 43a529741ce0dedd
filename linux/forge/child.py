"""The forge's program, `python -m linux.forge.child FD`: make anchors in new namespaces.

It makes one anchor after the other, by the operations in `SETUP`: enter new namespaces, prepare
them from inside, start a child in them, return to its own. If one fails, the forge returns, kills
what it has started, and answers with the operation and the call, errno and path of the failure.

The forge ignores the signals that end a service or come from a terminal, and runs as long as the
other end of its socketpair is open. Its anchors outlive it, unless it is *tied*: then it ends them,
and their scopes, before it exits, and they end by themselves if it is killed with its owner: their
standard input is its own, a pipe that only the owner can write to.
"""

from __future__ import annotations

import errno
import gc
import os
import platform
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from statemachine.messages import NamespaceType
from statemachine.record import record
from transport.calls import syscall
from transport.channel import receive_once, send_once
from transport.descriptors import Descriptor

from .. import syscalls
from ..anchor import ANCHOR_COMMAND, ANCHOR_VARIABLE, TIED_COMMAND, Anchor
from ..cgroups import Scope, remove_slice
from ..features import Features
from ..limits import protect_from_oom_killer
from ..mountinfo import MountWatch, mount_lines, parse_mount
from ..namespaces import CLONE_FLAGS, PROC_NAMES, expect_own_namespaces, open_namespace
from ..syscalls import Ioctl, SyscallError, calling
from .idle import IDLE_COMMAND, open_idle_program
from .plan import (
    RECORD_BYTES_MAX,
    RETURN,
    AnchorPlan,
    ForgeError,
    ForgeSettings,
    decode_plan,
    decode_settings,
    encode_failure,
    encode_success,
)

UNSHARE_ATTEMPTS_MAX: Final = 6
"""How often unshare(2) is tried when the limit of namespaces is reached."""

UNSHARE_PAUSE_MS: Final = 20
"""Pause between two attempts: a namespace counts for up to 70 ms after its end."""

TIED_ATTEMPTS_MAX: Final = 100
"""How often a tied forge tries to remove a scope before it gives up on it."""

TIED_PAUSE_MS: Final = 20
"""Pause between two attempts."""

TIED_DYING_MS: Final = 200
"""How long to wait for the end of an anchor that was killed."""

UENV_BASE_OPTIONS: Final = "mode=0755,size=64k"
"""Options of the tmpfs for the images' mount points; it contains directories only."""

_IMMUNE: Final = (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""
Ignored by the forge, and by its anchors, since an exec keeps what is ignored. The init of a PID
namespace is protected by the Linux kernel anyway; an anchor without one only by this. SIGCHLD
ignored makes the Linux kernel reap the forge's anchors, and the orphans that anchors inherit.
"""

_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)
"""Ignored by every Python interpreter; reset for an anchor."""

# struct ifreq: the name, the flags, and room for the largest member of its union.
_IFREQ: Final = struct.Struct("16sh22x")
_IFF_UP: Final = 0x1

_HARDENED: Final = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_PROC_ATTRIBUTES: Final = (
    syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)

_SYS: Final = "/sys"

_REFUSED: Final = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.ENODEV)
"""What the Linux kernel says to a sysfs that may not be mounted: in a container, for example."""

UMASK: Final = 0o022
"""So that every user can enter the directories of mount points, whatever the owner's umask."""

UNDO_LAST: Final = b"undo"
"""A request that is no plan: kill the last anchor, its descriptor did not arrive."""

TRY_OUT: Final = b"try"
"""A request that is no plan: make namespaces of every type and leave them, without an anchor."""


TRIAL_TOKEN: Final = "trial"
"""The token of an anchor that is started and killed, to see whether its program can be executed."""


class SysMounts:
    """
    What is mounted below /sys: read anew only if the node's mounts have changed.

    To be made in the node's mount namespace.

    Raises:
        SyscallError: changes cannot be watched for.
    """

    def __init__(self) -> None:
        self._watch: Final = MountWatch()
        self._known: tuple[list[str] | None] | None = None

    def below(self) -> list[str] | None:
        """
        List what is mounted directly below /sys, in order; None if there is no sysfs.

        To be called in a new mount namespace: it has the node's mounts of when it was made.

        Raises:
            SyscallError: they cannot be read.
        """
        if self._watch.has_changed():
            # Perhaps after this namespace was made: then the next one has others, and there will
            # be no other word of it.
            self._known = None
            return _mounts_below_sys(mount_lines())
        if self._known is None:
            self._known = (_mounts_below_sys(mount_lines()),)
        return self._known[0]


class AnchorProgram(NamedTuple):
    """What anchors execute."""

    path: str
    command: tuple[str, ...]
    tie: bool = False
    """Whether it has the forge's streams: it ends with what it reads there."""


class Work:
    """
    One anchor that is being made: its plan, and what there is of it so far.

    Args:
        plan: What to make.
        image: A detached mount for `plan.mount_path`; borrowed. None exactly if that is None.
        features: What the operations may use.
        program: What the anchor executes.
        sys_mounts: Of the forge.
    """

    def __init__(
        self,
        plan: AnchorPlan,
        image: Descriptor | None,
        features: Features,
        program: AnchorProgram,
        sys_mounts: SysMounts,
    ) -> None:
        self.plan: Final = plan
        self.image: Final = image
        self.features: Final = features
        self.program: Final = program
        self.sys_mounts: Final = sys_mounts
        self.anchor: Anchor | None = None
        self.is_away = False
        """Whether the forge is in this anchor's namespaces instead of its own."""
        self.shortfalls: list[str] = []
        """What the anchor lacks because the Linux kernel refuses it here."""

    @property
    def started(self) -> Anchor:
        """The anchor, in the operations that come after its start."""
        assert self.anchor is not None, "the anchor is started before this"
        return self.anchor

    def has(self, *kinds: NamespaceType) -> bool:
        """Say whether the plan has namespaces of all these types."""
        return all(kind in self.plan.kinds for kind in kinds)

    def abandon(self) -> None:
        """Kill the anchor, if there is one already."""
        if self.anchor is not None:
            with self.anchor:
                self.anchor.kill()


# --- operations -------------------------------------------------------------------------------


def _unshare(work: Work) -> None:
    # Keeps NODE-6, LIFE-9.
    flags = 0
    for kind in work.plan.kinds:
        flags |= CLONE_FLAGS[kind]
    for attempts_left in reversed(range(UNSHARE_ATTEMPTS_MAX)):
        try:
            syscalls.unshare(flags)
        except SyscallError as error:
            if error.errno != errno.ENOSPC or not attempts_left:
                raise
            _pause(UNSHARE_PAUSE_MS)
        else:
            work.is_away = True
            return


def _separate_mounts(work: Work) -> None:
    # Not private: a mount that is unmounted on the node must not stay in every allocation. Not
    # shared: what is mounted in an allocation must not appear on the node.
    # Keeps NODE-9.
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)


def _bring_up_lo(work: Work) -> None:
    # Keeps NODE-8.
    with calling("socket(2)"):
        any_socket = syscall(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    with any_socket:
        request = bytearray(_IFREQ.pack(b"lo", 0))
        syscalls.ioctl(any_socket, Ioctl.SIOCGIFFLAGS, request)
        name, flags = _IFREQ.unpack(request)
        request[:] = _IFREQ.pack(name, flags | _IFF_UP)
        syscalls.ioctl(any_socket, Ioctl.SIOCSIFFLAGS, request)


def _mount_sys(work: Work) -> None:
    # A sysfs shows the network namespace that it was mounted in. What is mounted below the node's
    # is put back on it: copies, so that what is unmounted or mounted there later comes here, too.
    # Keeps NODE-20.
    below = work.sys_mounts.below()
    if below is None:
        return
    with ExitStack() as stack:
        try:
            flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE
            copies = {
                path: stack.enter_context(syscalls.open_tree(syscalls.AT_FDCWD, path, flags))
                for path in below
            }
            context = stack.enter_context(syscalls.fsopen("sysfs"))
            syscalls.fsconfig_create(context)
            attributes = _PROC_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY
            mounted = stack.enter_context(syscalls.fsmount(context, attributes))
        except SyscallError as error:
            if error.errno not in _REFUSED:
                raise
            work.shortfalls.append(f"/sys shows the node's network: {error}")
            return
        syscalls.attach_mount(mounted, _SYS)
        for path, copy in copies.items():
            syscalls.attach_mount(copy, path)


def _mounts_below_sys(lines: list[str]) -> list[str] | None:
    """List what is mounted directly below /sys, in order; None if there is no sysfs."""
    # Only these lines are parsed: a node can have thousands.
    found = [parse_mount(line) for line in lines if f" {_SYS}" in line]
    mounts = {mount.point: mount.fstype for mount in found}
    if mounts.get(_SYS) != "sysfs":
        return None
    below: list[str] = []
    for path in sorted(mounts):  # so that each comes after those that it is below
        if path.startswith(f"{_SYS}/") and not path.startswith(tuple(f"{top}/" for top in below)):
            below.append(path)
    return below


def _mount_image(work: Work) -> None:
    # Keeps NODE-12.
    base, path = work.plan.uenv_base, work.plan.mount_path
    assert base is not None
    assert path is not None
    if work.image is None:
        # The owner has sent it, and this process had no descriptor left for it.
        raise SyscallError("recvmsg(2)", errno.EMFILE, path)
    # On the node this stays an empty directory: the tmpfs over it, the mount point and the image
    # exist in this mount namespace only.
    _make_folders(base)
    syscalls.mount("uenv", base, "tmpfs", _HARDENED, UENV_BASE_OPTIONS)
    _make_folders(path)
    syscalls.attach_mount(work.image, path)
    syscalls.mount(
        None, base, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | _HARDENED
    )


def _start_anchor(work: Work) -> None:
    # If the exec fails, the init of a PID namespace is dead, and with it the namespace.
    # Keeps NODE-7.
    work.anchor = _spawn(work.program, work.plan.token)


def _spawn(program: AnchorProgram, token: str) -> Anchor:
    # `cat` does not start without a standard output. Nothing is ever written there.
    tied = [(os.POSIX_SPAWN_DUP2, 0, fd) for fd in (1, 2)]
    untied = [(os.POSIX_SPAWN_CLOSE, fd) for fd in (0, 1, 2)]
    with calling("posix_spawn(3)", program.path):  # which reports the errno of a failed exec
        pid = syscall(
            os.posix_spawn,
            program.path,
            program.command,
            {ANCHOR_VARIABLE: token},
            file_actions=tied if program.tie else untied,
            setsid=True,
            setsigmask=(),
            setsigdef=_IGNORED_BY_PYTHON,
        )
    return Anchor(pid, _hold(pid), token)


def _hold(pid: int) -> Descriptor:
    """Open our child by its pid. If that fails it is killed, provided that it is our child."""
    with ExitStack() as undo:
        undo.callback(_kill_child, pid)
        pidfd = undo.enter_context(syscalls.pidfd_open(pid))
        # The Linux kernel reaps our children at once. If this one died at its start, another
        # process may have got its pid before the pidfd was opened: for that one waitid fails with
        # ECHILD. (The environment is no proof: posix_spawn returns before the exec sets it up.)
        with calling("waitid(2)", f"anchor {pid}"):
            syscall(os.waitid, os.P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOHANG)
        undo.pop_all()
    return pidfd


def _kill_child(pid: int) -> None:
    with suppress(OSError):
        syscall(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOHANG)
        syscall(os.kill, pid, signal.SIGKILL)


def _mount_proc(work: Work) -> None:
    # Keeps NODE-10.
    if work.features.proc_by_pidns:
        _mount_proc_from_outside(work)
    else:
        _mount_proc_from_inside()


def _mount_proc_from_outside(work: Work) -> None:
    namespace = open_namespace(work.started, NamespaceType.PID, work.features)
    with namespace, syscalls.fsopen("proc") as context:
        syscalls.fsconfig_string(context, "source", "proc")
        syscalls.fsconfig_fd(context, "pidns", namespace)
        syscalls.fsconfig_create(context)
        with syscalls.fsmount(context, _PROC_ATTRIBUTES) as mounted:
            syscalls.attach_mount(mounted, "/proc")


def _mount_proc_from_inside() -> None:
    # A /proc shows the PID namespace of the process that mounts it. The forge stays in the node's;
    # its next child is in the anchor's.
    with calling("pipe(2)"):
        answer, question = map(Descriptor, syscall(os.pipe))
    with answer, question:
        with calling("fork(2)"):
            pid = syscall(os.fork)
        if pid == 0:
            _mount_proc_and_exit(question)
        question.close()
        reported = syscall(os.read, answer.fileno(), struct.calcsize("i"))
    if not reported:
        raise SyscallError("mount(2)", errno.ECHILD, "/proc")
    (number,) = struct.unpack("i", reported)
    if number:
        raise SyscallError("mount(2)", number, "/proc")


def _mount_proc_and_exit(question: Descriptor) -> NoReturn:
    number = errno.EIO
    try:
        syscalls.mount("proc", "/proc", "proc", _HARDENED)
        number = 0
    except SyscallError as error:
        number = error.errno or errno.EIO
    finally:
        syscall(os.write, question.fileno(), struct.pack("i", number))
        os._exit(0)


_PROC_KINDS: Final = (NamespaceType.PID, NamespaceType.MOUNT)
_SYS_KINDS: Final = (NamespaceType.NET, NamespaceType.MOUNT)


class SetupOp(NamedTuple):
    """One operation in the making of an anchor."""

    name: str
    """Names it in errors."""
    applies: Callable[[Work], bool]
    """Whether this anchor needs it."""
    act: Callable[[Work], None]
    """Does it; raises `SyscallError`."""


PREPARATION: Final = (
    SetupOp("create the namespaces", lambda work: bool(work.plan.kinds), _unshare),
    SetupOp("separate the mounts", lambda work: work.has(NamespaceType.MOUNT), _separate_mounts),
    SetupOp("bring up lo", lambda work: work.has(NamespaceType.NET), _bring_up_lo),
    SetupOp("mount /sys", lambda work: work.has(*_SYS_KINDS), _mount_sys),
    SetupOp("mount the image", lambda work: work.plan.mount_path is not None, _mount_image),
)
"""What is done for one anchor before it starts: nothing of it is left after a return."""

SETUP: Final = (
    *PREPARATION,
    SetupOp("start the anchor", lambda work: True, _start_anchor),
    SetupOp("mount /proc", lambda work: work.has(*_PROC_KINDS), _mount_proc),
)
"""
Everything that is done for one anchor, in order.

With a PID namespace and no mount namespace /proc stays as it is, because mounting it would change
the node's: it shows the node's processes. So does /sys with a network namespace and no mount
namespace.
"""


# --- the forge --------------------------------------------------------------------------------


@record
class Tied:
    """An anchor that ends with the forge's owner, and its scope."""

    anchor: Anchor
    scope: Scope | None

    def is_over(self) -> bool:
        """Say whether nothing is left to end."""
        return not self.anchor.is_alive() and (self.scope is None or self.scope.is_gone())

    def end(self) -> bool:
        """Kill what is left; True once the scope is gone."""
        self.anchor.kill()
        if self.scope is None:
            return True
        self.scope.kill()
        return self.scope.remove()


class ForgeProgram:
    """
    The forge's side of the socketpair.

    Args:
        owner: This side's end of the socketpair.
        settings: What the owner asked of this forge.
    """

    def __init__(self, owner: socket.socket, settings: ForgeSettings) -> None:
        expect_own_namespaces()
        self._owner: Final = owner
        self._settings: Final = settings
        self._idle: Descriptor | None = None
        self._program: Final = self._choose_program()
        self._home: Final = {
            kind: syscalls.openat2(syscalls.AT_FDCWD, f"/proc/self/ns/{name}", os.O_RDONLY)
            for kind, name in PROC_NAMES.items()
        }
        self._sys_mounts: Final = SysMounts()
        self._tied: list[Tied] = []
        # Open until the next request, in case the owner could not receive the descriptor.
        self._last: Anchor | None = None

    def serve(self) -> None:
        """Make anchors until the owner closes its end."""
        while True:
            try:
                record, descriptors, *_ = receive_once(self._owner, RECORD_BYTES_MAX, 1)
            except ConnectionResetError:
                return
            with ExitStack() as stack:
                for descriptor in descriptors:
                    stack.enter_context(descriptor)
                if not record:
                    return
                if record == UNDO_LAST:
                    self._undo_last()
                elif record == TRY_OUT:
                    self._try_out()
                else:
                    self._answer(decode_plan(record), descriptors[0] if descriptors else None)

    def end_tied(self) -> None:
        """End every tied anchor with its scope, as far as that is possible in a bounded time."""
        remaining = self._tied
        for _ in range(TIED_ATTEMPTS_MAX):
            remaining = [tied for tied in remaining if not _succeeds(tied.end)]
            if not remaining:
                break
            _pause(TIED_PAUSE_MS)
        for tied in self._tied:
            # A process leaves its cgroup before it has ended. An init ends after its processes,
            # whose parent may never reap them if it is outside: so not without a limit.
            tied.anchor.is_alive(TIED_DYING_MS)
        for slice_ in {each.scope.path.parent for each in self._tied if each.scope}:
            remove_slice(slice_)

    def _answer(self, plan: AnchorPlan, image: Descriptor | None) -> None:
        self._drop_last()
        work = self._work(plan, image)
        try:
            self._last = self._make(work)
        except ForgeError as error:
            self._report(error)
            return
        try:
            answer = encode_success(self._last.pid, work.shortfalls)
            send_once(self._owner, answer, [self._last.pidfd.fileno()])
        except OSError:
            # The owner is gone, and does not know of this anchor.
            self._last.kill()
            raise

    def _work(self, plan: AnchorPlan, image: Descriptor | None) -> Work:
        features = self._settings.features
        return Work(plan, image, features, self._program, self._sys_mounts)

    def _choose_program(self) -> AnchorProgram:
        """Take the smallest program, if this node lets it be executed."""
        if self._settings.tied:
            return AnchorProgram(self._settings.program, TIED_COMMAND, tie=True)
        try:
            self._idle = open_idle_program(platform.machine())
            if self._idle is not None:
                # A path, because posix_spawn takes no descriptor; the child's own /proc/self.
                smallest = AnchorProgram(f"/proc/self/fd/{self._idle.fileno()}", IDLE_COMMAND)
                # Tried now: where it fails later, a namespace is lost.
                with _spawn(smallest, TRIAL_TOKEN) as anchor:
                    anchor.kill()
                return smallest
        except SyscallError:
            pass  # no memory for it, or no memfd may be executed
        return AnchorProgram(self._settings.program, ANCHOR_COMMAND)

    def _make(self, work: Work) -> Anchor:
        try:
            self._perform_all(SETUP, work)
            if self._settings.tied:
                self._tie(work)
        except BaseException:
            work.abandon()
            raise
        return work.started

    def _perform_all(self, operations: Sequence[SetupOp], work: Work) -> None:
        try:
            for operation in operations:
                if operation.applies(work):
                    _perform(operation.name, operation.act, work)
        finally:
            if work.is_away:
                _perform(RETURN, self._return, work)

    def _try_out(self) -> None:
        plan = AnchorPlan("none", tuple(NamespaceType))
        try:
            work = self._work(plan, None)
            self._perform_all(PREPARATION, work)
        except ForgeError as error:
            self._report(error)
        else:
            send_once(self._owner, encode_success(0))

    def _report(self, error: ForgeError) -> None:
        send_once(self._owner, encode_failure(error.step, error.cause))
        if error.step == RETURN:
            raise SystemExit(1) from error

    def _return(self, work: Work) -> None:
        for kind in work.plan.kinds:
            syscalls.setns(self._home[kind], CLONE_FLAGS[kind])
        work.is_away = False

    def _tie(self, work: Work) -> None:
        self._tied = [tied for tied in self._tied if not self._is_over(tied)]
        scope = None
        if work.plan.scope is not None:
            # It has the anchor's token. A scope of the same name that another owner has, by now or
            # later, is not touched.
            # Guard: a tied scope has its anchor's token.
            scope = Scope(Path(work.plan.scope), work.plan.token)
        anchor = work.started
        try:
            pidfd = anchor.pidfd.duplicate()
        except OSError as error:
            raise ForgeError("tie the anchor", SyscallError.of("fcntl(2)", error)) from error
        self._tied.append(Tied(Anchor(anchor.pid, pidfd, anchor.token), scope))

    def _is_over(self, tied: Tied) -> bool:
        if tied.is_over():
            tied.anchor.close()
            return True
        return False

    def _undo_last(self) -> None:
        if self._last is not None:
            self._last.kill()
        self._drop_last()
        send_once(self._owner, encode_success(0))

    def _drop_last(self) -> None:
        if self._last is not None:
            self._last.close()
            self._last = None


def _perform(name: str, act: Callable[[Work], None], work: Work) -> None:
    try:
        act(work)
    except SyscallError as error:
        raise ForgeError(name, error) from error


def _make_folders(path: str) -> None:
    with calling("mkdir(2)", path):
        syscall(Path(path).mkdir, mode=0o755, parents=True, exist_ok=True)


def _succeeds(act: Callable[[], bool]) -> bool:
    """Try something; an error counts as not yet possible."""
    try:
        return act()
    except OSError:
        return False


def _pause(milliseconds: int) -> None:
    select.poll().poll(milliseconds)


def _enter_cgroup(path: str) -> None:
    procs = Path(path) / "cgroup.procs"
    with calling("write(2)", procs):
        syscall(procs.write_text, "0", encoding="ascii")


def main() -> None:
    """Run a forge: receive the settings, confirm, make anchors until the owner closes its end."""
    gc.freeze()  # what is imported is no garbage: it need not be looked through at the end
    for number in _IMMUNE:
        signal.signal(number, signal.SIG_IGN)
    os.umask(UMASK)
    protect_from_oom_killer()
    with socket.socket(fileno=int(sys.argv[1])) as owner:
        owner.set_inheritable(False)
        settings = decode_settings(receive_once(owner, RECORD_BYTES_MAX, 0).data)
        try:
            if settings.cgroup is not None:
                _enter_cgroup(settings.cgroup)
            program = ForgeProgram(owner, settings)
        except SyscallError as error:
            send_once(owner, encode_failure("start the forge", error))
            return
        send_once(owner, encode_success(os.getpid()))
        try:
            program.serve()
        except Exception:
            # Printed before the socket closes, because the owner reads it as soon as that happens.
            sys.excepthook(*sys.exc_info())
            raise SystemExit(1) from None
        finally:
            program.end_tied()


if __name__ == "__main__":
    main()
