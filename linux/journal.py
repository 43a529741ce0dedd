"""The provider's journal: a SQLite file of its live allocations, for recovery after a crash.

An allocation is written down before anything is made for it (`intend`) and again when it reaches
another state (`publish`); a released one is removed and its id remembered (`forget`). A hand-over
or an end that is marked on the allocation's cgroup need not be written here as well. A provider
that starts again compares the entries with what the Linux kernel still has.

The journal has to survive the provider's process and not the machine, since namespaces do not
survive a reboot either: the boot id beside the entries makes them void then. Therefore SQLite runs
with `synchronous=OFF`. Pages that the Linux kernel has been given outlive the process; waiting for
the disk would only protect entries that a reboot makes worthless.

Damage is noticed, and never believed: each row has a checksum, and each change is counted, so that
`linux.recovery` can compare the count with the one that is kept outside the file, on the anchors'
cgroup. A journal knows which instance it belongs to (`linux.instance`) and beside which lock it was
written, so that a copy of it is known as one.

Only this module imports `sqlite3`. `linux.backend` writes the journal; `nshandoff list` reads it
with `read_journal`, which takes no lock that the provider needs.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self, TypeAlias, TypedDict, Unpack

from statemachine.errors import Copyable
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.provider import REMEMBERED_MAX
from statemachine.record import changed, record
from statemachine.states import AllocationState
from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

from .files import try_lock
from .instance import instance_of, is_open_as

JOURNAL_NAME: Final = "journal.sqlite3"
"""The journal's file in the state directory."""
LOCK_NAME: Final = "lock"
"""The file that a provider keeps locked while it runs; it contains the provider's pid."""

FILE_MODE: Final = 0o600
"""Permissions of the files, whatever those of the state directory."""

SCHEMA_VERSION: Final = 2
"""`PRAGMA user_version` of the files this module writes, and the only one it reads."""

HEADER_BYTES: Final = 100
"""Length of the header of a SQLite database; one that is blank has none."""

READ_ATTEMPTS_MAX: Final = 32
"""How often a reader starts again when a provider opens or closes the journal meanwhile."""

STATES: Final = (
    AllocationState.REQUESTED,
    AllocationState.CREATED,
    AllocationState.HANDED_OFF,
    AllocationState.ENDED,
)
"""The states that an entry can have; it only ever moves to the right. Stored by their values."""

_SCHEMA: Final = """
    CREATE TABLE boot (
        boot_id       TEXT NOT NULL,
        instance      TEXT NOT NULL,
        lock          TEXT NOT NULL,
        checksum      INTEGER NOT NULL
    );
    CREATE TABLE allocation (
        position      INTEGER PRIMARY KEY AUTOINCREMENT,
        allocation_id TEXT NOT NULL UNIQUE,
        incarnation   TEXT NOT NULL,
        state         TEXT NOT NULL,
        request       TEXT NOT NULL,
        mount_path    TEXT,
        anchor        TEXT,
        scope_path    TEXT,
        why           TEXT,
        change        INTEGER NOT NULL,
        checksum      INTEGER NOT NULL
    );
    CREATE TABLE ended (
        position      INTEGER PRIMARY KEY AUTOINCREMENT,
        allocation_id TEXT NOT NULL UNIQUE,
        change        INTEGER NOT NULL,
        checksum      INTEGER NOT NULL
    );
"""

_COLUMNS: Final = (
    "allocation_id, incarnation, state, request, mount_path, anchor, scope_path, why,"
    " change, checksum"
)

_LOG_SUFFIXES: Final = ("", "-wal", "-shm")
"""The files of a SQLite database, by what follows its name."""


class JournalError(Copyable, Exception):
    """The journal cannot be used; `path` names the file, `reason` what is wrong with it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path: Final = path
        self.reason: Final = reason


class JournalBusy(JournalError):
    """Another provider holds the state directory; nothing was read or written."""

    # Keeps CRASH-10.

    def __init__(self, path: Path, holder_pid: int | None) -> None:
        holder = "another process" if holder_pid is None else f"process {holder_pid}"
        super().__init__(path, f"{holder} holds this state directory; one provider may use it")
        self.holder_pid: Final = holder_pid


class JournalCorrupt(JournalError):
    """
    The file is no journal of ours, or a damaged one. It is left exactly as it was found.

    It may be the only record of live allocations: whether to delete it is the operator's decision.
    """

    # Keeps CRASH-11.


class JournalUnavailable(JournalError):
    """The journal cannot be opened or written (permission, space, I/O); it is unchanged."""


@record
class Entry:
    """One live allocation, as the journal has it."""

    allocation_id: str
    incarnation: str
    """The token of this incarnation; another allocation of the same id has another."""
    state: AllocationState
    """One of `STATES`."""
    request: NamespaceRequest
    """What was asked for, so that a repeated request can be recognised after a restart."""
    mount_path: str | None = None
    """Where the image is mounted inside the mount namespace, if one is."""
    anchor: Mapping[str, object] | None = None
    """The anchor's identity as plain JSON; None until there is an anchor."""
    scope_path: str | None = None
    """The allocation's cgroup."""
    why: str | None = None
    """Why an ended allocation is not released yet, for a person to read."""


class EntryFields(TypedDict, total=False):
    """The fields of an entry that become known later, by name."""

    mount_path: str | None
    """As `Entry.mount_path`."""
    anchor: Mapping[str, object] | None
    """As `AnchorIdentity.as_json` gives it."""
    scope_path: str | None
    """As `Entry.scope_path`."""
    why: str | None
    """As `Entry.why`."""


@record
class JournalView:
    """The content of a journal at one moment."""

    boot_id: str | None
    """The boot the entries belong to; None where there is no journal yet."""
    entries: tuple[Entry, ...] = ()
    """The live allocations, in the order in which they were intended."""
    remembered: tuple[str, ...] = ()
    """Ids of ended allocations, the oldest end first."""
    instance: str | None = None
    """The provider instance that it belongs to; None where there is no journal yet."""
    changes: int = 0
    """How many changes it has seen."""


class Journal(Owner):
    """
    The provider's own journal: open for writing, and locked against a second provider.

    Every change is one transaction, and visible to the next provider as soon as the call returns,
    even if this process is killed then. Usable from any thread.

    Args:
        state_dir: Where the journal lives; made (mode 0700) if absent.
        boot_id: This boot's id. Entries of another boot are removed, and their ids
            remembered as ended, which after a reboot they are.
        on_change: Told after each change how many there have been; must not raise.

    Raises:
        JournalBusy: another process holds `state_dir`.
        JournalCorrupt: the file is damaged or not ours; it is untouched.
        JournalUnavailable: the directory or the file cannot be opened or written.
    """

    def __init__(
        self, state_dir: Path, boot_id: str, on_change: Callable[[int], None] = lambda _: None
    ) -> None:
        self._state_dir: Final = state_dir
        self._path: Final = state_dir / JOURNAL_NAME
        self._guard: Final = threading.Lock()
        self.on_change = on_change
        self._changes = 0
        # What the file has, so that nothing has to be read from it to be changed.
        self._entries: Final[dict[str, Entry]] = {}
        self._remembered: Final[dict[str, None]] = {}
        self._lock = lock_directory(state_dir)
        try:
            self._database = _open_for_writing(self._path)
        except BaseException:
            self._lock.close()
            raise
        try:
            self._boot, self.is_copy = self._begin_boot(boot_id)
        except BaseException:
            self.close()
            raise

    is_copy: bool
    """Whether it was written beside another lock file in this boot: it was copied or restored."""

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self._path

    @property
    def instance(self) -> str:
        """The provider instance that the journal belongs to."""
        return self._boot.instance

    @property
    def changes(self) -> int:
        """How many changes the journal has seen."""
        return self._changes

    def count_from(self, changes: int) -> None:
        """Count on from a number that is at least the journal's own; the next change stores it."""
        with self._guard:
            self._changes = max(changes, self._changes)

    def intend(self, entry: Entry) -> None:
        """
        Add an allocation, before anything is made for it.

        Raises:
            ValueError: the id already has an entry; it is unchanged.
            JournalUnavailable: nothing was written, so nothing may be made.
        """
        with self._guard:
            if entry.allocation_id in self._entries:
                raise ValueError(f"allocation {entry.allocation_id!r} already has an entry")
            self._change(_insertion(entry, self._changes + 1))
            self._entries[entry.allocation_id] = entry

    def publish(
        self, allocation_id: str, state: AllocationState, **fields: Unpack[EntryFields]
    ) -> None:
        """
        Set the state of an allocation, and the given fields; all others stay as they are.

        Raises:
            KeyError: the allocation has no entry.
            ValueError: the entry's state comes after `state`.
            JournalUnavailable: it cannot be written. The entry is unchanged in every case.
        """
        with self._guard:
            entry = self._entries[allocation_id]
            if STATES.index(state) < STATES.index(entry.state):
                reason = f"is {entry.state.value}; it cannot become {state.value}"
                raise ValueError(f"{allocation_id!r} {reason}")
            after = changed(entry, state=state, **fields)
            _, _, *columns = _encode_entry(after, self._changes + 1)
            self._change(
                (
                    "UPDATE allocation SET state = ?, request = ?, mount_path = ?, anchor = ?,"
                    " scope_path = ?, why = ?, change = ?, checksum = ? WHERE allocation_id = ?",
                    (*columns, allocation_id),
                )
            )
            self._entries[allocation_id] = after

    def forget(self, allocation_id: str) -> None:
        """Remove a released allocation and remember its id; nothing if it has no entry."""
        with self._guard:
            if allocation_id not in self._entries:
                return
            oldest = next(iter(self._remembered), allocation_id)
            is_full = len(self._remembered) >= REMEMBERED_MAX
            too_many = [oldest] if is_full and allocation_id not in self._remembered else []
            self._change(
                ("DELETE FROM allocation WHERE allocation_id = ?", (allocation_id,)),
                _remembering(allocation_id, self._changes + 1),
                *(("DELETE FROM ended WHERE allocation_id = ?", (name,)) for name in too_many),
            )
            for name in (allocation_id, *too_many):
                self._remembered.pop(name, None)
            # An id that ended again is the last one now.
            self._remembered[allocation_id] = None
            del self._entries[allocation_id]

    def find(self, allocation_id: str) -> Entry | None:
        """Return the entry of an allocation; None if it has none."""
        with self._guard:
            self._expect_open()
            return self._entries.get(allocation_id)

    def entries(self) -> tuple[Entry, ...]:
        """Return the live allocations, in the order in which they were intended."""
        with self._guard:
            self._expect_open()
            return tuple(self._entries.values())

    def remembered(self) -> tuple[str, ...]:
        """Return the ids of released allocations, at most `REMEMBERED_MAX`, the oldest first."""
        # Keeps CRASH-6.
        with self._guard:
            self._expect_open()
            return tuple(self._remembered)

    def is_lost(self) -> bool:
        """Say whether the lock or the journal is gone from the state directory, or another's."""
        # Guard: the lock is still in its directory.
        is_locked = is_open_as(self._state_dir / LOCK_NAME, self._lock)
        # Guard: the journal is still the file that was opened.
        return not (is_locked and self._path_is_ours())

    def make_again(self) -> None:
        """
        Lock the state directory and write the journal again, after both or one were taken away.

        What is found in their place is set aside, not overwritten.

        Raises:
            JournalBusy: another provider has taken the directory.
            JournalUnavailable: it cannot be written. In both cases the journal is closed: this
                provider cannot go on.
        """
        # Keeps CRASH-17.
        with self._guard:
            # Closed first: SQLite removes its log by the name that the new one has as well.
            self._database.close()
            # Guard: a lock that is gone is taken again.
            if not is_open_as(self._state_dir / LOCK_NAME, self._lock):
                lock = lock_directory(self._state_dir)
                before, self._lock = self._lock, lock
                before.close()
            set_aside(self._state_dir)
            self._database = _open_for_writing(self._path)
            self._file = _fingerprint(self._path)
            boot = changed(self._boot, lock=_name_of_lock(self._lock))
            with _typed_errors(self._path), _transaction(self._database):
                for name in self._remembered:
                    _execute(self._database, _remembering(name, self._changes))
                for entry in self._entries.values():
                    _execute(self._database, _insertion(entry, self._changes))
                _execute(self._database, _marking(boot))
            self._boot = boot

    def close(self) -> None:
        """Close the journal and unlock the state directory. Idempotent."""
        with self._guard:
            self._database.close()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _expect_open(self) -> None:
        self._database.total_changes  # noqa: B018 - raises ProgrammingError if it is closed

    def _path_is_ours(self) -> bool:
        now = _fingerprint(self._path)
        return now is not None and self._file is not None and now[2:] == self._file[2:]

    def _begin_boot(self, boot_id: str) -> tuple[_Boot, bool]:
        # Keeps CRASH-9.
        self._file = _fingerprint(self._path)
        try:
            lock = _name_of_lock(self._lock)
        except OSError as error:
            raise JournalUnavailable(self._path, error.strerror or str(error)) from error
        with _typed_errors(self._path), _transaction(self._database):
            # All of it, to refuse what cannot be read now, not later.
            entries, before = _read_entries(self._database), _read_boot(self._database)
            remembered = _read_remembered(self._database)
            if before is None and entries:
                raise JournalCorrupt(self._path, "it has entries, and does not say of which boot")
            if before is not None and before.boot_id == boot_id:
                boot, is_copy = changed(before, lock=lock), before.lock != lock
                if is_copy:
                    _execute(self._database, _marking(boot))
                self._changes = _read_changes(self._database)
            else:
                boot, is_copy = _Boot(boot_id, instance_of(self._state_dir), lock), False
                remembered, entries = self._end_all(remembered, entries), ()
                _execute(self._database, _marking(boot))
        self._entries.update({entry.allocation_id: entry for entry in entries})
        self._remembered.update(dict.fromkeys(remembered))
        return boot, is_copy

    def _end_all(self, remembered: tuple[str, ...], entries: tuple[Entry, ...]) -> tuple[str, ...]:
        """Remember all entries as ended, as they are after a reboot; return what is remembered."""
        ended = tuple(entry.allocation_id for entry in entries)
        names = (*(name for name in remembered if name not in ended), *ended)[-REMEMBERED_MAX:]
        for statement in ("DELETE FROM allocation", "DELETE FROM ended"):
            _execute(self._database, (statement, ()))
        for name in names:
            _execute(self._database, _remembering(name, 0))
        return names

    def _change(self, *statements: _Statement) -> None:
        """Change the journal in one transaction, and count the change; with the lock held."""
        with _typed_errors(self._path):
            if len(statements) == 1:  # it is a transaction by itself
                _execute(self._database, statements[0])
            else:
                with _transaction(self._database):
                    for statement in statements:
                        _execute(self._database, statement)
        self._changes += 1
        # Afterwards, so that the count outside is never ahead of a journal that is whole.
        self.on_change(self._changes)


def read_journal(state_dir: Path) -> JournalView:
    """
    Read a journal without changing anything, whether its provider runs or not.

    For processes other than the provider, which asks its own `Journal`: within one process SQLite
    would let the two share one state, and the reader's "read only" would become the writer's.

    Returns:
        A consistent view; an empty one where there is no journal.

    Raises:
        JournalCorrupt: the file is damaged or not ours.
        JournalUnavailable: it cannot be opened, or changes faster than it can be read.
    """
    path = state_dir / JOURNAL_NAME
    failure = JournalUnavailable(path, "it changes faster than it can be read")
    for _ in range(READ_ATTEMPTS_MAX):
        before = _fingerprint(path)
        if before is None:
            return JournalView(boot_id=None)
        is_shared = _is_shared(path)
        try:
            view = _read_by(path, _SHARED if is_shared else _AT_REST)
        except JournalUnavailable as error:
            failure = error  # a provider that closes just now removes its log meanwhile
            continue
        except JournalCorrupt:
            if is_shared or _is_at_rest(path, before):
                raise
            continue
        # We told SQLite that the file is immutable. If a provider has opened it since, the view can
        # be a mixture of two states.
        if is_shared or _is_at_rest(path, before):
            return view
    raise failure


_SHARED: Final = "mode=ro&readonly_shm=1"
"""
For a journal with a log: its provider runs or was killed, and the log is part of the journal.

Without `readonly_shm` SQLite would open the index of the log for writing even in mode=ro, and
create it if it is missing.
"""

_AT_REST: Final = "mode=ro&immutable=1"
"""For a journal that its provider closed: one file, which nothing writes to."""


def _read_by(path: Path, options: str) -> JournalView:
    _expect_header(path)
    with _typed_errors(path):
        database = syscall(sqlite3.connect, f"{path.absolute().as_uri()}?{options}", uri=True)
        try:
            database.isolation_level = None
            syscall(database.execute, "BEGIN")  # all reads below see one state
            if _is_new(database, path):
                return JournalView(boot_id=None)
            return JournalView(
                boot_id=None if (boot := _read_boot(database)) is None else boot.boot_id,
                entries=_read_entries(database),
                remembered=_read_remembered(database),
                instance=None if boot is None else boot.instance,
                changes=_read_changes(database),
            )
        finally:
            database.close()


def _is_shared(path: Path) -> bool:
    # SQLite creates the index after the log, and removes it before the log when it closes. While
    # only one of the two exists, everything in the log is in the file as well.
    return all(syscall(Path(f"{path}{suffix}").exists) for suffix in ("-wal", "-shm"))


def _is_at_rest(path: Path, fingerprint: tuple[int, ...]) -> bool:
    # Guard: what was read has not changed meanwhile.
    return not _is_shared(path) and _fingerprint(path) == fingerprint


def _fingerprint(path: Path) -> tuple[int, ...] | None:
    try:
        status = syscall(path.stat)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalUnavailable(path, error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise JournalUnavailable(path, "it is no regular file")
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def is_held(state_dir: Path) -> bool:
    """Say whether a running provider holds a state directory."""
    path = state_dir / LOCK_NAME
    try:
        with Descriptor(syscall(os.open, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as lock:
            syscall(fcntl.flock, lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def lock_directory(state_dir: Path) -> Descriptor:
    """
    Lock a state directory as a provider does.

    Returns:
        The lock, owned by the caller; closing it unlocks.

    Raises:
        JournalBusy: a provider holds it.
        JournalUnavailable: it cannot be made or locked.
    """
    path = state_dir / LOCK_NAME
    try:
        syscall(state_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        lock = Descriptor(syscall(os.open, path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
    except OSError as error:
        raise JournalUnavailable(path, error.strerror or str(error)) from error
    try:
        _hold(lock, path)
    except BaseException:
        lock.close()
        raise
    return lock


def _hold(lock: Descriptor, path: Path) -> None:
    try:
        is_locked = try_lock(lock, fcntl.LOCK_EX, lambda: _holder_of(lock))
    except OSError as error:
        raise JournalUnavailable(path, error.strerror or str(error)) from error
    if not is_locked:
        raise JournalBusy(path, _holder_of(lock))
    # The file is never removed: that would let two providers lock two files of one name. The pid
    # in it is for people, and a full disk has no room for it; only the lock keeps others out.
    with suppress(OSError):
        syscall(os.ftruncate, lock.fileno(), 0)
        syscall(os.pwrite, lock.fileno(), f"{os.getpid()}\n".encode(), 0)


def _holder_of(lock: Descriptor) -> int | None:
    written = syscall(os.pread, lock.fileno(), 32, 0).strip()
    return int(written) if written.isdigit() else None


def _open_for_writing(path: Path) -> sqlite3.Connection:
    _expect_header(path)
    _make_private(path)
    with _typed_errors(path):
        # check_same_thread is off because our own lock admits one thread at a time, any of them.
        database = syscall(sqlite3.connect, path, check_same_thread=False, isolation_level=None)
        try:
            _prepare(database, path)
        except BaseException:
            database.close()
            raise
        return database


def _make_private(path: Path) -> None:
    """Make the file, unless it is there, for its owner alone."""
    # SQLite gives its other files the permissions of this one. A lock that another user takes on
    # any of them, for which reading is enough, would keep it from being written.
    # Keeps PEER-18.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        # Not opened if it is there: to close it again would give up locks of this process.
        with suppress(FileExistsError):
            Descriptor(syscall(os.open, path, flags, FILE_MODE)).close()
        syscall(path.chmod, FILE_MODE)
    except OSError as error:
        raise JournalUnavailable(path, error.strerror or str(error)) from error


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    is_new = _is_new(database, path)
    syscall(database.execute, "PRAGMA journal_mode = WAL")
    syscall(database.execute, "PRAGMA synchronous = OFF")
    verdict = syscall(database.execute, "PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise JournalCorrupt(path, f"SQLite finds it damaged: {verdict}")
    if is_new:
        with _transaction(database):
            for statement in _SCHEMA.split(";"):
                syscall(database.execute, statement)
            syscall(database.execute, f"PRAGMA user_version = {SCHEMA_VERSION}")


def _expect_header(path: Path) -> None:
    # SQLite takes a file that is shorter than its header for a blank database and overwrites it.
    fingerprint = _fingerprint(path)
    if fingerprint is not None and 0 < fingerprint[0] < HEADER_BYTES:
        raise JournalCorrupt(path, "it is too short to be a database")


def _is_new(database: sqlite3.Connection, path: Path) -> bool:
    """Say whether the database is blank; refuse one that is neither blank nor a journal."""
    version = int(syscall(database.execute, "PRAGMA user_version").fetchone()[0])
    if version == SCHEMA_VERSION:
        return False
    tables = syscall(database.execute, "SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version == 0 and tables == 0:
        return True
    raise JournalCorrupt(path, f"it has schema version {version}, not {SCHEMA_VERSION}")


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    syscall(database.execute, "BEGIN IMMEDIATE")
    try:
        yield
        syscall(database.execute, "COMMIT")
    except BaseException:
        # SQLite rolls back by itself when, for example, the disk is full.
        if database.in_transaction:
            syscall(database.execute, "ROLLBACK")
        raise


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # used after close(): a mistake of the caller's
    except sqlite3.Error as error:
        primary_code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if primary_code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise JournalCorrupt(path, str(error)) from error
        raise JournalUnavailable(path, str(error)) from error
    except _UnreadableEntry as error:
        raise JournalCorrupt(path, str(error)) from error


@record
class _Boot:
    """What the journal says of itself."""

    boot_id: str
    instance: str
    lock: str
    """Which lock file it was written beside: the file's device and inode."""


def set_aside(state_dir: Path) -> list[Path]:
    """
    Rename the files of a journal, so that a new one can be begun; nothing is deleted.

    For a state directory that no provider uses.

    Returns:
        The new names; empty if there was no journal.

    Raises:
        JournalUnavailable: they cannot be renamed.
    """
    path = state_dir / JOURNAL_NAME
    number = 1
    while syscall(_aside(path, number, "").exists):
        number += 1
    moved: list[Path] = []
    # The log first: a journal without its log is older, and a log without its journal nothing.
    for suffix in reversed(_LOG_SUFFIXES):
        try:
            moved.append(syscall(Path(f"{path}{suffix}").rename, _aside(path, number, suffix)))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise JournalUnavailable(path, error.strerror or str(error)) from error
    return moved


def _aside(path: Path, number: int, suffix: str) -> Path:
    return Path(f"{path}.aside-{number}{suffix}")


def _name_of_lock(lock: Descriptor) -> str:
    status = syscall(os.fstat, lock.fileno())
    return f"{status.st_dev}:{status.st_ino}"


def _checksum(*values: object) -> int:
    """Tell a row that was written here from one that was damaged."""
    # Keeps CRASH-18.
    return zlib.crc32(json.dumps(values).encode())


_Statement: TypeAlias = tuple[str, tuple[object, ...]]
"""SQL, and the values for its question marks."""


def _execute(database: sqlite3.Connection, statement: _Statement) -> None:
    syscall(database.execute, *statement)


def _insertion(entry: Entry, change: int) -> _Statement:
    marks = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
    return f"INSERT INTO allocation ({_COLUMNS}) VALUES ({marks})", _encode_entry(entry, change)


def _marking(boot: _Boot) -> _Statement:
    values = (boot.boot_id, boot.instance, boot.lock)
    return (
        "REPLACE INTO boot (rowid, boot_id, instance, lock, checksum) VALUES (1, ?, ?, ?, ?)",
        (*values, _checksum(*values)),
    )


def _remembering(allocation_id: str, change: int) -> _Statement:
    # REPLACE moves an id that ended again to the last position.
    return (
        "REPLACE INTO ended (allocation_id, change, checksum) VALUES (?, ?, ?)",
        (allocation_id, change, _checksum(allocation_id, change)),
    )


def _read_boot(database: sqlite3.Connection) -> _Boot | None:
    row = syscall(database.execute, "SELECT boot_id, instance, lock, checksum FROM boot").fetchone()
    if row is None:
        return None
    *values, checksum = row
    if checksum != _checksum(*values):
        raise _UnreadableEntry("the boot that it is of is unreadable: its checksum is wrong")
    return _Boot(*values)


def _read_changes(database: sqlite3.Connection) -> int:
    """
    Return the number of the last change.

    Each change is numbered in the row that it writes, which no later one removes without having a
    number of its own: a counter in a place of its own would be one more page to write each time.
    """
    query = (
        "SELECT max(change) FROM (SELECT change FROM allocation UNION ALL SELECT change FROM ended)"
    )
    return int(syscall(database.execute, query).fetchone()[0] or 0)


def _read_entries(database: sqlite3.Connection) -> tuple[Entry, ...]:
    rows = syscall(database.execute, f"SELECT {_COLUMNS} FROM allocation ORDER BY position")
    return tuple(_decode_entry(row) for row in rows)


def _read_remembered(database: sqlite3.Connection) -> tuple[str, ...]:
    rows = syscall(
        database.execute, "SELECT allocation_id, change, checksum FROM ended ORDER BY position"
    ).fetchall()
    for name, change, checksum in rows:
        if checksum != _checksum(name, change):
            raise _UnreadableEntry(f"the remembered {name!r} is unreadable: its checksum is wrong")
    return tuple(str(name) for name, _, _ in rows)


_EntryRow: TypeAlias = tuple[
    str, str, str, str, str | None, str | None, str | None, str | None, int, int
]


class _UnreadableEntry(Exception):
    """A row has a value that this module never writes."""


def _encode_entry(entry: Entry, change: int) -> _EntryRow:
    values = (
        entry.allocation_id,
        entry.incarnation,
        entry.state.value,
        encode_request(entry.request),
        entry.mount_path,
        None if entry.anchor is None else json.dumps(dict(entry.anchor)),
        entry.scope_path,
        entry.why,
        change,
    )
    return (*values, _checksum(*values))


def _decode_entry(row: _EntryRow) -> Entry:
    allocation_id, incarnation, state, request, mount_path, anchor, scope_path, why, _, checksum = (
        row
    )
    try:
        if checksum != _checksum(*row[:-1]):
            raise ValueError("its checksum is wrong")
        return Entry(
            allocation_id=allocation_id,
            incarnation=incarnation,
            state=STATES[STATES.index(AllocationState(state))],
            request=decode_request(request),
            mount_path=mount_path,
            anchor=None if anchor is None else dict(json.loads(anchor)),
            scope_path=scope_path,
            why=why,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise _UnreadableEntry(f"the entry of {allocation_id!r} is unreadable: {error}") from error


def encode_request(request: NamespaceRequest) -> str:
    """Write a request as text; `decode_request` reads it."""
    return json.dumps(
        {
            "allocation_id": request.allocation_id,
            "namespaces": [kind.value for kind in request.namespaces],
            "uenv_image": request.uenv_image,
        }
    )


def decode_request(text: str) -> NamespaceRequest:
    """
    Read what `encode_request` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    fields = json.loads(text)
    return NamespaceRequest(
        allocation_id=fields["allocation_id"],
        namespaces=tuple(NamespaceType(name) for name in fields["namespaces"]),
        uenv_image=fields["uenv_image"],
    )
