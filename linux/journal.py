"""The provider's journal: a SQLite file of its live allocations, for recovery after a crash.

An allocation is written down before anything is made for it (`intend`) and again when it reaches
another state (`publish`); a released one is removed and its id remembered (`forget`). A provider
that starts again compares the entries with what the Linux kernel still has.

The journal has to survive the provider's process and not the machine, since namespaces do not
survive a reboot either: the boot id beside the entries makes them void then. Therefore SQLite runs
with `synchronous=OFF`. Pages that the Linux kernel has been given outlive the process; waiting for
the disk would only protect entries that a reboot makes worthless.

Only this module imports `sqlite3`. `linux.backend` writes the journal; `nshandoff list` reads it
with `read_journal`, which takes no lock that the provider needs.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self, TypeAlias, TypedDict, Unpack

from statemachine.lifecycle import AllocationState
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.provider import REMEMBERED_MAX
from transport.calls import syscall
from transport.descriptors import Descriptor

JOURNAL_NAME: Final = "journal.sqlite3"
"""The journal's file in the state directory."""
LOCK_NAME: Final = "lock"
"""The file that a provider keeps locked while it runs; it contains the provider's pid."""

SCHEMA_VERSION: Final = 1
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
    CREATE TABLE boot (boot_id TEXT NOT NULL);
    CREATE TABLE allocation (
        position      INTEGER PRIMARY KEY AUTOINCREMENT,
        allocation_id TEXT NOT NULL UNIQUE,
        incarnation   TEXT NOT NULL,
        state         TEXT NOT NULL,
        request       TEXT NOT NULL,
        mount_path    TEXT,
        anchor        TEXT,
        scope_path    TEXT,
        why           TEXT
    );
    CREATE TABLE ended (
        position      INTEGER PRIMARY KEY AUTOINCREMENT,
        allocation_id TEXT NOT NULL UNIQUE
    );
"""

_COLUMNS: Final = "allocation_id, incarnation, state, request, mount_path, anchor, scope_path, why"


class JournalError(Exception):
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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class JournalView:
    """The content of a journal at one moment."""

    boot_id: str | None
    """The boot the entries belong to; None where there is no journal yet."""
    entries: tuple[Entry, ...] = ()
    """The live allocations, in the order in which they were intended."""
    remembered: tuple[str, ...] = ()
    """Ids of ended allocations, the oldest end first."""


class Journal:
    """
    The provider's own journal: open for writing, and locked against a second provider.

    Every change is one transaction, and visible to the next provider as soon as the call returns,
    even if this process is killed then. Usable from any thread.

    Args:
        state_dir: Where the journal lives; made (mode 0700) if absent.
        boot_id: This boot's id. Entries of another boot are removed, and their ids
            remembered as ended, which after a reboot they are.

    Raises:
        JournalBusy: another process holds `state_dir`.
        JournalCorrupt: the file is damaged or not ours; it is untouched.
        JournalUnavailable: the directory or the file cannot be opened or written.
    """

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self._path: Final = state_dir / JOURNAL_NAME
        self._guard: Final = threading.Lock()
        self._lock: Final = _lock_directory(state_dir)
        try:
            self._database: Final = _open_for_writing(self._path)
        except BaseException:
            self._lock.close()
            raise
        try:
            self._begin_boot(boot_id)
        except BaseException:
            self.close()
            raise

    def intend(self, entry: Entry) -> None:
        """
        Add an allocation, before anything is made for it.

        Raises:
            ValueError: the id already has an entry; it is unchanged.
            JournalUnavailable: nothing was written, so nothing may be made.
        """
        with self._transaction() as database:
            if _find(database, entry.allocation_id) is not None:
                raise ValueError(f"allocation {entry.allocation_id!r} already has an entry")
            syscall(
                database.execute,
                f"INSERT INTO allocation ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                _encode_entry(entry),
            )

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
        with self._transaction() as database:
            entry = _find(database, allocation_id)
            if entry is None:
                raise KeyError(allocation_id)
            if STATES.index(state) < STATES.index(entry.state):
                reason = f"is {entry.state.value}; it cannot become {state.value}"
                raise ValueError(f"{allocation_id!r} {reason}")
            _, _, *columns = _encode_entry(replace(entry, state=state, **fields))
            syscall(
                database.execute,
                "UPDATE allocation SET state = ?, request = ?, mount_path = ?, anchor = ?,"
                " scope_path = ?, why = ? WHERE allocation_id = ?",
                (*columns, allocation_id),
            )

    def forget(self, allocation_id: str) -> None:
        """Remove a released allocation and remember its id; nothing if it has no entry."""
        with self._transaction() as database:
            removed = syscall(
                database.execute, "DELETE FROM allocation WHERE allocation_id = ?", (allocation_id,)
            )
            if removed.rowcount:
                _remember(database, allocation_id)

    def entries(self) -> tuple[Entry, ...]:
        """Return the live allocations, in the order in which they were intended."""
        with self._transaction() as database:
            return _read_entries(database)

    def remembered(self) -> tuple[str, ...]:
        """Return the ids of released allocations, at most `REMEMBERED_MAX`, the oldest first."""
        # Keeps CRASH-6.
        with self._transaction() as database:
            return _read_remembered(database)

    def close(self) -> None:
        """Close the journal and unlock the state directory. Idempotent."""
        with self._guard:
            self._database.close()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_boot(self, boot_id: str) -> None:
        # Keeps CRASH-9.
        with self._transaction() as database:
            entries = _read_entries(database)  # also to refuse what cannot be read now, not later
            if _read_boot_id(database) == boot_id:
                return
            for entry in entries:
                _remember(database, entry.allocation_id)
            syscall(database.execute, "DELETE FROM allocation")
            syscall(database.execute, "DELETE FROM boot")
            syscall(database.execute, "INSERT INTO boot VALUES (?)", (boot_id,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guard, _typed_errors(self._path), _transaction(self._database):
            yield self._database


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
                boot_id=_read_boot_id(database),
                entries=_read_entries(database),
                remembered=_read_remembered(database),
            )
        finally:
            database.close()


def _is_shared(path: Path) -> bool:
    # SQLite creates the index after the log, and removes it before the log when it closes. While
    # only one of the two exists, everything in the log is in the file as well.
    return all(syscall(Path(f"{path}{suffix}").exists) for suffix in ("-wal", "-shm"))


def _is_at_rest(path: Path, fingerprint: tuple[int, ...]) -> bool:
    return not _is_shared(path) and _fingerprint(path) == fingerprint


def _fingerprint(path: Path) -> tuple[int, ...] | None:
    try:
        status = syscall(path.stat)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalUnavailable(path, error.strerror or str(error)) from error
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def _lock_directory(state_dir: Path) -> Descriptor:
    path = state_dir / LOCK_NAME
    try:
        syscall(state_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        lock = Descriptor(syscall(os.open, path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
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
        syscall(fcntl.flock, lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalBusy(path, _holder_of(lock)) from None
    except OSError as error:
        raise JournalUnavailable(path, error.strerror or str(error)) from error
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
    with _typed_errors(path):
        # check_same_thread is off because our own lock admits one thread at a time, any of them.
        database = syscall(sqlite3.connect, path, check_same_thread=False, isolation_level=None)
        try:
            _prepare(database, path)
        except BaseException:
            database.close()
            raise
        return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    is_new = _is_new(database, path)
    syscall(database.execute, "PRAGMA journal_mode = WAL")
    syscall(database.execute, "PRAGMA synchronous = OFF")
    verdict = syscall(database.execute, "PRAGMA quick_check(1)").fetchone()[0]
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


def _remember(database: sqlite3.Connection, allocation_id: str) -> None:
    # REPLACE moves an id that ended again to the last position.
    syscall(database.execute, "REPLACE INTO ended (allocation_id) VALUES (?)", (allocation_id,))
    syscall(
        database.execute,
        "DELETE FROM ended WHERE position <="
        " (SELECT position FROM ended ORDER BY position DESC LIMIT 1 OFFSET ?)",
        (REMEMBERED_MAX,),
    )


def _read_boot_id(database: sqlite3.Connection) -> str | None:
    row = syscall(database.execute, "SELECT boot_id FROM boot").fetchone()
    return None if row is None else str(row[0])


def _read_entries(database: sqlite3.Connection) -> tuple[Entry, ...]:
    rows = syscall(database.execute, f"SELECT {_COLUMNS} FROM allocation ORDER BY position")
    return tuple(_decode_entry(row) for row in rows)


def _read_remembered(database: sqlite3.Connection) -> tuple[str, ...]:
    rows = syscall(database.execute, "SELECT allocation_id FROM ended ORDER BY position")
    return tuple(str(allocation_id) for (allocation_id,) in rows)


def _find(database: sqlite3.Connection, allocation_id: str) -> Entry | None:
    row = syscall(
        database.execute,
        f"SELECT {_COLUMNS} FROM allocation WHERE allocation_id = ?",
        (allocation_id,),
    ).fetchone()
    return None if row is None else _decode_entry(row)


_Row: TypeAlias = tuple[str, str, str, str, str | None, str | None, str | None, str | None]


class _UnreadableEntry(Exception):
    """A row has a value that this module never writes."""


def _encode_entry(entry: Entry) -> _Row:
    return (
        entry.allocation_id,
        entry.incarnation,
        entry.state.value,
        _encode_request(entry.request),
        entry.mount_path,
        None if entry.anchor is None else json.dumps(dict(entry.anchor)),
        entry.scope_path,
        entry.why,
    )


def _decode_entry(row: _Row) -> Entry:
    allocation_id, incarnation, state, request, mount_path, anchor, scope_path, why = row
    try:
        return Entry(
            allocation_id=allocation_id,
            incarnation=incarnation,
            state=STATES[STATES.index(AllocationState(state))],
            request=_decode_request(request),
            mount_path=mount_path,
            anchor=None if anchor is None else dict(json.loads(anchor)),
            scope_path=scope_path,
            why=why,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise _UnreadableEntry(f"the entry of {allocation_id!r} is unreadable: {error}") from error


def _encode_request(request: NamespaceRequest) -> str:
    return json.dumps(
        {
            "allocation_id": request.allocation_id,
            "namespaces": [kind.value for kind in request.namespaces],
            "uenv_image": request.uenv_image,
        }
    )


def _decode_request(text: str) -> NamespaceRequest:
    fields = json.loads(text)
    return NamespaceRequest(
        allocation_id=fields["allocation_id"],
        namespaces=tuple(NamespaceType(name) for name in fields["namespaces"]),
        uenv_image=fields["uenv_image"],
    )
