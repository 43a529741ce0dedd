"""What did this provider promise before it died? The one file that survives it.

A provider that is killed and started again must know which allocations it was making, which it had
handed over and which had ended. So every step is written down *before* it is taken (`intend`) and
again once it is done (`publish`); what is over is struck out and its id remembered (`forget`).
On its next start the provider compares these entries with what the Linux kernel still has.

The journal survives the provider's process, not the machine: namespaces do not survive that either,
and the boot id written beside the entries voids all of them after a reboot. This is why SQLite runs
with `synchronous=OFF`: pages handed to the Linux kernel outlive the process that wrote them, and
waiting for the disk would protect entries that a reboot makes worthless.

Only this module imports `sqlite3`. `linux.backend` writes the journal; `nshandoff list` reads it
with `read_journal`, which never takes a lock that the provider needs.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias, TypedDict, Unpack, get_args

from statemachine.messages import NamespaceRequest, NamespaceType
from transport.calls import syscall
from transport.descriptors import Descriptor

JOURNAL_NAME: Final = "journal.sqlite3"
"""The journal's file in the state directory."""
LOCK_NAME: Final = "lock"
"""The file whose lock a provider holds as long as it lives; the holder's pid stands in it."""

REMEMBERED_MAX: Final = 1024
"""How many ended allocations are remembered by id; the oldest end is forgotten first."""

SCHEMA_VERSION: Final = 1
"""`PRAGMA user_version` of the files this module writes, and the only one it reads."""

HEADER_BYTES: Final = 100
"""Every SQLite database begins with so many bytes, unless it is blank and has none."""

READ_ATTEMPTS_MAX: Final = 32
"""How often a reader starts again when a provider opens or closes the journal under it."""

State: TypeAlias = Literal["requested", "created", "handed_off", "ended"]
"""Where an allocation stands, as far as the node needs to know."""

STATES: Final[tuple[State, ...]] = get_args(State)
"""The states an entry can be in; an entry only ever moves to the right."""

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

    It may be the only record of live allocations, so deleting it is an operator's decision.
    """

    # Keeps CRASH-11.


class JournalUnavailable(JournalError):
    """The journal cannot be opened or written (permission, space, I/O); the last entry stands."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is written down about one live allocation."""

    allocation_id: str
    incarnation: str
    """The token that tells this life of the id from earlier and later ones."""
    state: State
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
    """Where its image is mounted, inside."""
    anchor: Mapping[str, object] | None
    """Who its anchor is, as `AnchorIdentity.as_json` says it."""
    scope_path: str | None
    """Its scope."""
    why: str | None
    """Why it is not released yet."""


@dataclass(frozen=True, slots=True)
class JournalView:
    """One consistent look at a journal."""

    boot_id: str | None
    """The boot the entries belong to; None where there is no journal yet."""
    entries: tuple[Entry, ...] = ()
    """The live allocations, in the order in which they were intended."""
    remembered: tuple[str, ...] = ()
    """Ids of ended allocations, the oldest end first."""


class Journal:
    """
    The provider's own journal: open for writing, and locked against a second provider.

    Every change is one transaction and is there for the next provider as soon as the call returns,
    whatever becomes of this process. Usable from any thread.

    Args:
        state_dir: Where the journal lives; made (mode 0700) if absent.
        boot_id: This boot's id. Entries of another boot are struck out and offered as `voided`;
            their ids are remembered as ended, which after a reboot is the truth.

    Raises:
        JournalBusy: another process holds `state_dir`.
        JournalCorrupt: the file is damaged or not ours; it is untouched.
        JournalUnavailable: the directory or the file cannot be opened or written.
    """

    voided: Final[tuple[Entry, ...]]
    """The entries that a reboot made void, as found when the journal was opened."""

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
            self.voided = self._begin_boot(boot_id)
        except BaseException:
            self.close()
            raise

    def intend(self, entry: Entry) -> None:
        """
        Write down an allocation before anything is done for it.

        Raises:
            ValueError: the id already has an entry; it is unchanged.
            JournalUnavailable: nothing was written, so nothing may be done.
        """
        with self._transaction() as database:
            if _find(database, entry.allocation_id) is not None:
                raise ValueError(f"allocation {entry.allocation_id!r} already has an entry")
            syscall(
                database.execute,
                f"INSERT INTO allocation ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                _encode_entry(entry),
            )

    def publish(self, allocation_id: str, state: State, **fields: Unpack[EntryFields]) -> None:
        """
        Write down what an allocation has become. Fields that are not named stay as they are.

        Raises:
            KeyError: the allocation has no entry.
            ValueError: the entry is further on than `state`; it is unchanged.
            JournalUnavailable: nothing was written; the entry still says what it said.
        """
        with self._transaction() as database:
            entry = _find(database, allocation_id)
            if entry is None:
                raise KeyError(allocation_id)
            if STATES.index(state) < STATES.index(entry.state):
                raise ValueError(f"{allocation_id!r} is {entry.state}; it cannot become {state}")
            _, _, *columns = _encode_entry(replace(entry, state=state, **fields))
            syscall(
                database.execute,
                "UPDATE allocation SET state = ?, request = ?, mount_path = ?, anchor = ?,"
                " scope_path = ?, why = ? WHERE allocation_id = ?",
                (*columns, allocation_id),
            )

    def forget(self, allocation_id: str) -> None:
        """Strike out an allocation that is released, and remember its id; if it has an entry."""
        with self._transaction() as database:
            struck = syscall(
                database.execute, "DELETE FROM allocation WHERE allocation_id = ?", (allocation_id,)
            )
            if struck.rowcount:
                _remember(database, allocation_id)

    def entries(self) -> tuple[Entry, ...]:
        """Return the live allocations, in the order in which they were intended."""
        with self._transaction() as database:
            return _read_entries(database)

    def remembered(self) -> tuple[str, ...]:
        """Return the ids of ended allocations (at most `REMEMBERED_MAX`), the oldest end first."""
        # Keeps CRASH-6.
        with self._transaction() as database:
            return _read_remembered(database)

    def close(self) -> None:
        """Close the journal and let go of the state directory. Idempotent."""
        with self._guard:
            self._database.close()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin_boot(self, boot_id: str) -> tuple[Entry, ...]:
        # Keeps CRASH-9.
        with self._transaction() as database:
            if _read_boot_id(database) == boot_id:
                _read_entries(database)  # a journal that cannot be read is refused now, not later
                return ()
            voided = _read_entries(database)
            for entry in voided:
                _remember(database, entry.allocation_id)
            syscall(database.execute, "DELETE FROM allocation")
            syscall(database.execute, "DELETE FROM boot")
            syscall(database.execute, "INSERT INTO boot VALUES (?)", (boot_id,))
            return voided

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guard, _typed_errors(self._path), _transaction(self._database):
            yield self._database


def read_journal(state_dir: Path) -> JournalView:
    """
    Look at a journal without touching it, whether its provider lives, died or was never there.

    For processes other than the provider, which asks its own `Journal`: within one process SQLite
    would let the two share one state, and the reader's "read only" would become the writer's.

    Returns:
        One consistent view; an empty one where there is no journal.

    Raises:
        JournalCorrupt: the file is damaged or not ours.
        JournalUnavailable: it cannot be opened, or never stood still long enough to be read.
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
            failure = error  # a provider that closes just now takes its log away under us
            continue
        except JournalCorrupt:
            if is_shared or _is_at_rest(path, before):
                raise
            continue
        # "Immutable" was our word for it: had a provider come, the view could be a mixture.
        if is_shared or _is_at_rest(path, before):
            return view
    raise failure


_SHARED: Final = "mode=ro&readonly_shm=1"
"""Beside a provider, or after one that was killed: its log is part of the journal.

Even in mode=ro SQLite would open, and if need be create, the index of the log for writing.
"""

_AT_REST: Final = "mode=ro&immutable=1"
"""After a provider that closed its journal: one file, and nobody writes to it."""


def _read_by(path: Path, options: str) -> JournalView:
    _expect_header(path)
    with _typed_errors(path):
        database = syscall(sqlite3.connect, f"{path.absolute().as_uri()}?{options}", uri=True)
        try:
            database.isolation_level = None
            syscall(database.execute, "BEGIN")  # all reads below see one and the same moment
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
    # SQLite removes the index before the log when it closes, and creates it after the log. With
    # only one of the two there is nothing in the log that is not in the file as well.
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
    # The file stays when we go: removing a lock file lets two providers lock two files of one name.
    # The pid in it is for people; what excludes a second provider is the lock alone.
    syscall(os.ftruncate, lock.fileno(), 0)
    syscall(os.pwrite, lock.fileno(), f"{os.getpid()}\n".encode(), 0)


def _holder_of(lock: Descriptor) -> int | None:
    written = syscall(os.pread, lock.fileno(), 32, 0).strip()
    return int(written) if written.isdigit() else None


def _open_for_writing(path: Path) -> sqlite3.Connection:
    _expect_header(path)
    with _typed_errors(path):
        # check_same_thread: our own lock does better, it admits any thread but one at a time.
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
    # SQLite takes what is shorter than its header for a blank database, and writes over it.
    fingerprint = _fingerprint(path)
    if fingerprint is not None and 0 < fingerprint[0] < HEADER_BYTES:
        raise JournalCorrupt(path, "it is too short to be a database")


def _is_new(database: sqlite3.Connection, path: Path) -> bool:
    """Tell a journal of ours (False) from a database that is still blank (True); refuse others."""
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
        # SQLite itself rolls back when, for example, the disk is full.
        if database.in_transaction:
            syscall(database.execute, "ROLLBACK")
        raise


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # used after close(): our own mistake
    except sqlite3.Error as error:
        primary_code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if primary_code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise JournalCorrupt(path, str(error)) from error
        raise JournalUnavailable(path, str(error)) from error
    except _UnreadableEntry as error:
        raise JournalCorrupt(path, str(error)) from error


def _remember(database: sqlite3.Connection, allocation_id: str) -> None:
    # REPLACE gives an id that ended again a new, last position.
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
    """A row that this module cannot have written."""


def _encode_entry(entry: Entry) -> _Row:
    return (
        entry.allocation_id,
        entry.incarnation,
        entry.state,
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
            state=STATES[STATES.index(state)],
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
