"""`Forge`: start the helper process that makes anchors, and ask it for one.

The forge is a small process with one thread that only makes anchors. If the provider forked them
itself, every fork would copy its page tables and descriptor table, and every allocation its mounts.
Besides, a thread that enters other namespaces affects the other threads of its process.

Processes are created in the files of this folder and nowhere else.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from transport.calls import syscall
from transport.channel import Reception, receive_once, send_once
from transport.descriptors import Descriptor, Owner

from .. import syscalls
from ..anchor import ANCHOR_COMMAND, ANCHOR_VARIABLE, TIED_COMMAND, Anchor, token_of
from ..features import Features
from ..limits import restore_descriptor_limit
from ..syscalls import SyscallError, calling
from .child import TRY_OUT, UNDO_LAST
from .plan import (
    RECORD_BYTES_MAX,
    RETURN,
    AnchorPlan,
    ForgeError,
    ForgeSettings,
    decode_answer,
    encode_plan,
    encode_settings,
    shortfalls_in,
)

START_TIMEOUT_S: Final = 60.0
"""How long the forge may take to start: a Python that starts, perhaps on a slow or busy machine."""

FORGE_TIMEOUT_S: Final = 10.0
"""How long the forge may take to make an anchor, or to end. It needs a millisecond."""

STDERR_BYTES_MAX: Final = 4096
"""How much of the standard error of a forge that died is read; the last line says why."""

FORGE_COMMAND: Final = (sys.executable, "-P", "-m", "linux.forge.child")
"""How a forge is started; the descriptor number of its socket is appended."""

UNREPORTED_SEARCHES_MAX: Final = 5
"""How often to search for an anchor that a forge started before it died."""

UNREPORTED_PAUSE_MS: Final = 2
"""Pause between two searches: an exec that has begun is done by then."""

_NO_TOKEN: Final = "\0"
"""No anchor has it: an environment cannot contain it."""

_log: Final = logging.getLogger(__name__)

_PACKAGES: Final = str(Path(__file__).resolve().parents[2])


class Forge(Owner):
    """
    The owner's side of a forge. Usable from any thread; anchors are made one at a time.

    The process starts with the first anchor, or with `start`. One that died is replaced when the
    next anchor is asked for; the anchors that it made stay alive.

    Args:
        cgroup: Directory of the cgroup for the anchors and the forge, so that `find_anchors` finds
            them whatever happens to their owner; None for the owner's own. It must exist before the
            forge starts.
        tied: Whether the anchors, and their scopes, end when the owner closes this or dies. For
            self-service, where no provider ends them. If the forge is killed as well, nothing
            removes the scopes, but the anchors still end. Otherwise they outlive the owner.
        features: What the forge may use.
        command: Starts a program that is a forge.
    """

    # Keeps CRASH-1, SELF-12, SELF-14.

    def __init__(
        self,
        *,
        cgroup: Path | None,
        tied: bool = False,
        features: Features,
        command: Sequence[str] = FORGE_COMMAND,
    ) -> None:
        self._command: Final = tuple(command)
        self._cgroup: Final = cgroup
        self._tied: Final = tied
        self._features: Final = features
        self._guard: Final = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._tie: tuple[Descriptor, Descriptor] | None = None
        """A pipe whose end tied anchors wait for; only the owner and its forks can write to it."""
        self._stderr: Descriptor | None = None
        self._closed = False
        self._said: Final[set[str]] = set()
        """What was warned of: once is enough, it is so for every anchor."""

    @classmethod
    def start(cls, *, cgroup: Path | None, tied: bool = False, features: Features) -> Forge:
        """
        Construct a forge and start its process, so that a failure is known early.

        Raises:
            ForgeError: it cannot be started; nothing is left.
        """
        forge = cls(cgroup=cgroup, tied=tied, features=features)
        forge.ensure_started()
        return forge

    def ensure_started(self) -> None:
        """
        Start the process unless it runs.

        Raises:
            ForgeError: it cannot be started; nothing is left.
            ValueError: the forge is closed.
        """
        with self._guard:
            self._ensure_started()

    @property
    def pid(self) -> int | None:
        """The pid of the forge's process; None while there is none."""
        child = self._child
        return None if child is None else child.pid

    def make(self, plan: AnchorPlan, image: Descriptor | None = None) -> Anchor:
        """
        Make an anchor, with its namespaces ready for use.

        Args:
            plan: What to make.
            image: A detached mount for `plan.mount_path`; given exactly if that is. Closed in every
                case, because an open descriptor of it keeps the image mounted.

        Returns:
            The running anchor; the caller owns it.

        Raises:
            ForgeError: a step failed, or the forge took longer than `FORGE_TIMEOUT_S` (it is dead
                then), or two of them died. Nothing is left of the attempt.
            ValueError: plan and image do not fit, or the forge is closed.
        """
        with ExitStack() as stack:
            if image is not None:
                stack.enter_context(image)
            if (image is None) is not (plan.mount_path is None):
                raise ValueError("an image and a mount path belong together")
            record = encode_plan(plan)
            with self._guard:
                self._ensure_started()
                return self._exchange(plan, record, image)

    def try_out(self) -> None:
        """
        Find out whether namespaces of every type can be made here, and returned from.

        Raises:
            ForgeError: they cannot, with the call that failed; nothing is left.
            ValueError: the forge is closed.
        """
        with self._guard:
            self._ensure_started()
            self._pid_in(self._ask_for(_NO_TOKEN, TRY_OUT, None))

    def close(self) -> None:
        """
        End the forge; a tied one ends its anchors and their scopes first. Idempotent.

        Waits for it, at most `FORGE_TIMEOUT_S`; then it is killed.
        """
        with self._guard:
            self._closed = True
            self._end(patiently=True)
            for end in self._tie or ():
                end.close()

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ensure_started(self) -> None:
        if self._closed:
            raise ValueError("the forge is closed")
        if self._child is not None and self._child.poll() is not None:
            self._end(patiently=False)
        if self._child is None:
            self._start()

    def _start(self) -> None:
        try:
            self._launch()
            answer = self._ask(encode_settings(self._settings()), None)
            decode_answer(answer.data)
            assert self._socket is not None
            self._socket.settimeout(FORGE_TIMEOUT_S)
        except OSError as error:
            cause = SyscallError.of("execve(2)", error, self._read_stderr() or sys.executable)
            self._end(patiently=False)
            raise ForgeError("start the forge", cause) from error
        except BaseException:
            self._end(patiently=False)
            raise

    def _launch(self) -> None:
        with calling("socketpair(2)"):
            ours, theirs = syscall(socket.socketpair, socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        ours.settimeout(START_TIMEOUT_S)
        with theirs:
            if self._tied and self._tie is None:
                with calling("pipe(2)"):
                    reading, writing = map(Descriptor, syscall(os.pipe))
                self._tie = reading, writing
            with calling("memfd_create(2)"):
                self._stderr = Descriptor(syscall(os.memfd_create, "forge", os.MFD_CLOEXEC))
            # In a session of its own, so that Ctrl-C at the owner's terminal does not reach it; and
            # without the owner's streams, which it would keep open after the owner's end.
            self._child = syscall(
                subprocess.Popen,
                [*self._command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL if self._tie is None else self._tie[0].fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._stderr.fileno(),
                cwd="/",
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        with calling("prlimit(2)"):
            restore_descriptor_limit(self._child.pid)

    def _settings(self) -> ForgeSettings:
        return ForgeSettings(
            features=self._features,
            program=_find_program(TIED_COMMAND if self._tied else ANCHOR_COMMAND),
            cgroup=None if self._cgroup is None else str(self._cgroup),
            tied=self._tied,
        )

    def _exchange(self, plan: AnchorPlan, record: bytes, image: Descriptor | None) -> Anchor:
        answer = self._ask_for(plan.token, record, image)
        pid = self._pid_in(answer)
        if not answer.descriptors:
            # The pidfd was sent and withheld: no descriptor was left for it here, or a security
            # module denies it. The forge still has it.
            with self._ending_if_unanswered(plan.token):
                self._ask(UNDO_LAST, None)
            number = answer.denied[0] if answer.denied else errno.EMFILE
            raise ForgeError("receive the anchor", SyscallError("recvmsg(2)", number))
        for shortfall in shortfalls_in(answer.data):
            if shortfall not in self._said:
                _log.warning("%s", shortfall)
            self._said.add(shortfall)
        return Anchor(pid, answer.descriptors[0], plan.token)

    def _pid_in(self, answer: Reception) -> int:
        try:
            return decode_answer(answer.data)
        except ForgeError as error:
            if error.step == RETURN:
                self._end(patiently=True)
            raise

    def _ask_for(self, token: str, record: bytes, image: Descriptor | None) -> Reception:
        """Ask for an anchor; ask a second forge if the first one is dead, or dies of it."""
        with self._ending_if_unanswered(token):
            with suppress(ConnectionError):
                return self._ask(record, image)
            self._end(patiently=False)
            self._kill_unreported(token)
            self._start()
            return self._ask(record, image)

    @contextmanager
    def _ending_if_unanswered(self, token: str) -> Iterator[None]:
        """If the body fails, end the forge, and the anchor that it may have started."""
        try:
            yield
        except BaseException as error:
            # Also if only this side was interrupted: the answer would be taken for the next one's.
            stderr = self._read_stderr()
            self._end(patiently=False)
            self._kill_unreported(token)
            if isinstance(error, OSError):
                cause = SyscallError.of("recvmsg(2)", error, stderr or "the forge")
                raise ForgeError("ask the forge", cause) from error
            raise

    def _ask(self, record: bytes, descriptor: Descriptor | None) -> Reception:
        """
        Send a request and receive the answer.

        Raises:
            ConnectionError: the forge has died, before it did anything for this or afterwards.
            TimeoutError: it did not answer.
        """
        assert self._socket is not None
        send_once(self._socket, record, [] if descriptor is None else [descriptor.fileno()])
        answer = receive_once(self._socket, RECORD_BYTES_MAX, 1)
        if not answer.data:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return answer

    def _read_stderr(self) -> str:
        """Return the last line that the forge printed: empty unless it died of a mistake."""
        if self._stderr is None:
            return ""
        size = syscall(os.fstat, self._stderr.fileno()).st_size
        begin = max(0, size - STDERR_BYTES_MAX)
        printed = syscall(os.pread, self._stderr.fileno(), STDERR_BYTES_MAX, begin)
        return printed.decode("utf-8", "replace").strip().rpartition("\n")[2]

    def _end(self, *, patiently: bool) -> None:
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        child, self._child = self._child, None
        if child is None:
            return
        if not patiently:
            child.kill()
        try:
            child.wait(FORGE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            # If it is still there it hangs in the Linux kernel, and an error now is better than to
            # wait. The subprocess module reaps it later.
            with suppress(subprocess.TimeoutExpired):
                child.wait(FORGE_TIMEOUT_S)

    def _kill_unreported(self, token: str) -> None:
        """Kill the anchor that a forge had started before it died without reporting it."""
        for _ in range(UNREPORTED_SEARCHES_MAX):
            # It has its token from its exec on, which may be about to happen.
            is_settled = True
            for pid in _pids_in(self._cgroup):
                with suppress(SyscallError), syscalls.pidfd_open(pid) as pidfd:
                    # The pidfd came first, and tokens are never used twice: this is the anchor.
                    found = token_of(pid)
                    if found == token:
                        syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
                        return
                    is_settled = is_settled and found is not None
            if is_settled:
                return
            select.poll().poll(UNREPORTED_PAUSE_MS)


def _find_program(command: Sequence[str]) -> str:
    program = shutil.which(command[0])
    if program is None:
        raise ForgeError(
            "find the anchor's program in PATH",
            SyscallError("execve(2)", errno.ENOENT, command[0]),
        )
    return str(Path(program).resolve())


def _environment() -> dict[str, str]:
    """Return our environment, with a PYTHONPATH that leads to these packages."""
    environment = {name: value for name, value in os.environ.items() if name != ANCHOR_VARIABLE}
    paths = [_PACKAGES, *(str(Path(entry).absolute()) for entry in sys.path if entry)]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _pids_in(cgroup: Path | None) -> list[int]:
    """List the processes that can be an unreported anchor: in the anchors' cgroup, or anywhere."""
    if cgroup is None:
        return [int(entry.name) for entry in syscall(Path("/proc").iterdir) if entry.name.isdigit()]
    try:
        return [int(pid) for pid in syscall((cgroup / "cgroup.procs").read_text).split()]
    except OSError:
        return []  # a cgroup that is gone is empty
