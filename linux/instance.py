"""Lock a provider's anchors, and a consumer's own scope, on the node: who holds them is alive.

A provider's state directory can be copied, moved, or deleted under it and made anew. What cannot is
the cgroup of its anchors. So that cgroup is what a running provider locks: `Instance.lock`. The
lock ends with its process, however that ends, and who has no lock touches nothing of that instance.

The cgroup also carries, as extended attributes, what is to be known if the files are lost: which
provider locked it last, where scopes can be, and how many changes its journal had seen.

A consumer that serves itself has no journal and no anchors' cgroup. It locks its scope instead, by
`hold_scope`. If such a scope is not locked, its consumer is dead: `release_ownerless` removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Self

from statemachine.errors import Copyable
from statemachine.record import fields_of, record
from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

from .cgroups import (
    LEAVING_ATTEMPTS_MAX,
    LEAVING_PAUSE_MS,
    WORKLOAD_SLICE,
    Scope,
    ScopeError,
    ScopePlace,
    anchor_cgroup,
    anchor_path,
    end_scope,
    read_attribute,
)
from .files import try_lock

PROVIDER_ATTRIBUTE: Final = "user.nshandoff.provider"
"""Extended attribute of the anchors' cgroup: the provider that locked it last, as JSON."""

CHANGES_ATTRIBUTE: Final = "user.nshandoff.changes"
"""Extended attribute of the anchors' cgroup: how many changes the journal had seen."""

OWN_TOKEN_PREFIX: Final = "self-"
"""Begins the token of a consumer that serves itself, so that its scope says what it is."""

LOCK_ATTEMPTS_MAX: Final = 16
"""How often the cgroup is locked again when it is removed meanwhile."""


class InstanceBusy(Copyable, Exception):
    """Another provider has this instance's anchors; nothing was changed."""

    # Keeps CRASH-15.

    def __init__(self, path: Path, holder: ProviderNote | None) -> None:
        if holder is None:
            who = "another process"
        else:
            who = f"process {holder.pid}, whose state directory is {holder.state_dir},"
        super().__init__(
            f"{path}: {who} holds the anchors of this state directory; stop that provider, or use"
            " a state directory of its own that is no copy"
        )
        self.holder: Final = holder


@record
class ProviderNote:
    """Which provider locked an instance last."""

    pid: int
    state_dir: str
    """Absolute path."""
    scope_parents: tuple[str, ...] = ()
    """The cgroups in which it, and those before it, made scopes: below the mount point."""


def instance_of(state_dir: Path) -> str:
    """Name the instance of a new state directory; its journal keeps the name if it is moved."""
    # Only a provider does it.
    from hashlib import sha256

    digest = sha256(os.fsencode(state_dir.resolve())).hexdigest()
    return f"nshandoff-{digest[:16]}"


class Instance(Owner):
    """
    The anchors' cgroup of one instance, locked; made by `lock`.

    Closing it, or the end of the process, unlocks it. Used by one thread at a time, except
    `note_changes`.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        state_dir: Path | None,
        directory: Descriptor,
        scope_parents: frozenset[str],
    ) -> None:
        self.name: Final = name
        self.path: Final = anchor_path(root, name)
        self._root: Final = root
        self._state_dir: Final = state_dir
        self._directory = directory
        self.scope_parents: Final = scope_parents
        """The cgroups in which scopes of this instance can be: now, before, and by default."""

    @classmethod
    def lock(
        cls, root: Path, name: str, state_dir: Path | None, scope_parent: str = WORKLOAD_SLICE
    ) -> Self:
        """
        Make the cgroup, unless it is there, and lock it for this process.

        Args:
            root: The mount point of cgroup v2.
            name: The instance; see `instance_of`.
            state_dir: Noted, with this process, for people and for `nshandoff doctor`; None for a
                program that is no provider.
            scope_parent: The cgroup in which this provider makes scopes; noted likewise.

        Raises:
            InstanceBusy: a running provider has it.
            ScopeError: it cannot be made or locked, or it cannot be noted where scopes are.
        """
        # Keeps CRASH-15.
        directory = _lock(root, name)
        parents = scope_parents_of(root, name) | {scope_parent}
        instance = cls(root, name, state_dir, directory, parents)
        try:
            instance._note_provider()
        except ScopeError:
            instance.close()
            raise
        return instance

    def is_lost(self) -> bool:
        """Say whether the cgroup was removed; what this object has locked is of no use then."""
        return not is_open_as(self.path, self._directory)

    def make_again(self) -> None:
        """
        Make and lock the cgroup again after another program removed it.

        Raises:
            InstanceBusy: another provider was faster; this one has no power over it any more.
            ScopeError: it cannot be made or locked.
        """
        directory = _lock(self._root, self.name)
        before, self._directory = self._directory, directory
        before.close()
        self._note_provider()

    def changes(self) -> int:
        """Return how many changes the journal had seen when that was last noted; 0 if never."""
        return noted_changes(self._root, self.name)

    def note_changes(self, changes: int) -> None:
        """Note how many changes the journal has seen; an older note does no harm."""
        with suppress(OSError, ValueError):
            syscall(os.setxattr, self._directory.fileno(), CHANGES_ATTRIBUTE, str(changes).encode())

    def close(self) -> None:
        """Unlock it. Idempotent."""
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note_provider(self) -> None:
        if self._state_dir is None:
            return
        parents = tuple(sorted(self.scope_parents))
        note = ProviderNote(os.getpid(), str(self._state_dir.absolute()), parents)
        try:
            syscall(
                os.setxattr,
                self._directory.fileno(),
                PROVIDER_ATTRIBUTE,
                json.dumps(fields_of(note)).encode(),
            )
        except OSError as error:
            # Who does not know where scopes are takes them for removed, and their inits for dead.
            if self.scope_parents != {WORKLOAD_SLICE}:
                raise ScopeError.of("setxattr(2)", error, self.path) from error


def is_open_as(path: Path, descriptor: Descriptor) -> bool:
    """
    Say whether a path leads to what a descriptor refers to; what cannot be read does.

    Args:
        path: What is looked at.
        descriptor: Lent.
    """
    try:
        there, ours = syscall(path.stat), syscall(os.fstat, descriptor.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # no proof that it does not
    return os.path.samestat(there, ours)


def is_locked(root: Path, instance: str) -> bool:
    """
    Say whether a running provider has an instance; takes no lock that a provider would notice.

    Raises:
        SyscallError: it cannot be found out.
    """
    path = anchor_path(root, instance)
    try:
        with _opened(path) as directory:
            # A shared lock that is given up at once: a provider that starts just now tries again.
            return not _is_locked_now(directory, path, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def noted_changes(root: Path, instance: str) -> int:
    """Return how many changes an instance's journal had seen when that was noted; 0 if never."""
    text = _attribute(anchor_path(root, instance), CHANGES_ATTRIBUTE)
    return int(text) if text is not None and text.isdigit() else 0


def provider_of(root: Path, instance: str) -> ProviderNote | None:
    """Say which provider locked an instance last; None if that was not noted."""
    text = _attribute(anchor_path(root, instance), PROVIDER_ATTRIBUTE)
    try:
        plain = json.loads(text or "")
        parents = tuple(ScopePlace(str(each)).parent for each in plain["scope_parents"])
        return ProviderNote(int(plain["pid"]), str(plain["state_dir"]), parents)
    except (ValueError, KeyError, TypeError):
        return None


def scope_parents_of(root: Path, instance: str) -> frozenset[str]:
    """Say in which cgroups scopes of an instance can be: where it noted, and by default."""
    note = provider_of(root, instance)
    return frozenset({WORKLOAD_SLICE, *(() if note is None else note.scope_parents)})


# --- Scopes of self-service --------------------------------------------------------------------


def new_own_token() -> str:
    """Make the token of one incarnation of an allocation that a consumer makes itself."""
    return f"{OWN_TOKEN_PREFIX}{os.urandom(16).hex()}"


def hold_scope(path: Path, token: str) -> Descriptor:
    """
    Lock a scope that was just made, until the descriptor is closed here and in every fork.

    Args:
        path: The scope.
        token: Its owner, from `new_own_token`.

    Raises:
        ScopeError: it is gone: before it was locked, another program took it for ownerless.
    """
    # Keeps SELF-14.
    with ExitStack() as undo:
        try:
            directory = undo.enter_context(_opened(path))
        except FileNotFoundError as error:
            raise ScopeError.of("open(2)", error, path) from error
        for _ in range(LEAVING_ATTEMPTS_MAX):
            if _is_locked_now(directory, path, fcntl.LOCK_SH):
                break
            select.poll().poll(LEAVING_PAUSE_MS)  # another program looks at it, or removes it
        else:
            raise ScopeError("flock(2)", errno.EAGAIN, path, "another program keeps it locked")
        # Only now: what is locked is not removed any more.
        if Scope(path, token).is_gone():
            raise ScopeError("flock(2)", errno.ENOENT, path, "another program removed it")
        undo.pop_all()
        return directory


def is_own_scope_held(path: Path) -> bool:
    """Say whether the consumer that made a scope of self-service lives; takes no lock for long."""
    try:
        with _opened(path) as directory:
            return not _is_locked_now(directory, path, fcntl.LOCK_EX)
    except FileNotFoundError:
        return False


def release_ownerless(path: Path) -> bool:
    """
    Kill what is in a scope of self-service, and remove it, if its consumer is proved dead.

    A scope that was made here and has no owner is removed if it is empty. A maker that is only
    about to become its owner makes it again.

    Returns:
        True if it is gone; False if it has an owner, or is not empty yet.

    Raises:
        ScopeError: it cannot be locked, killed or removed.
    """
    # Keeps SELF-15.
    owner = Scope(path, "").owner()
    if owner is None:
        return Scope(path, new_own_token()).remove() and not syscall(path.exists)
    if not owner.startswith(OWN_TOKEN_PREFIX):
        return False
    try:
        with _opened(path) as directory:
            return _is_locked_now(directory, path, fcntl.LOCK_EX) and end_scope(Scope(path, owner))
    except FileNotFoundError:
        return True


def _lock(root: Path, name: str) -> Descriptor:
    def holder() -> int | None:
        note = provider_of(root, name)
        return None if note is None else note.pid

    for _ in range(LOCK_ATTEMPTS_MAX):
        path = anchor_cgroup(root, name)
        try:
            directory = _opened(path)
        except FileNotFoundError:
            continue  # removed since
        try:
            if not _is_locked_now(directory, path, fcntl.LOCK_EX, holder):
                raise InstanceBusy(path, provider_of(root, name))
            # Guard: the instance that is locked is at its path.
            if is_open_as(path, directory):
                return directory
        except BaseException:
            directory.close()
            raise
        directory.close()
    raise ScopeError("flock(2)", errno.ENOENT, path, "another program keeps removing it")


def _opened(path: Path) -> Descriptor:
    try:
        return Descriptor(syscall(os.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ScopeError.of("open(2)", error, path) from error


def _is_locked_now(
    directory: Descriptor, path: Path, kind: int, holder: Callable[[], int | None] = lambda: None
) -> bool:
    """Lock a directory; False if another process has locked it."""
    try:
        return try_lock(directory, kind, holder)
    except OSError as error:
        raise ScopeError.of("flock(2)", error, path) from error


def _attribute(path: Path, name: str) -> str | None:
    with suppress(ScopeError):
        return read_attribute(path, name)
    return None
