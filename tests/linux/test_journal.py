"""The journal survives the provider's process, whole, and is void after a reboot."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from linux.instance import instance_of
from linux.journal import (
    _COLUMNS,
    JOURNAL_NAME,
    LOCK_NAME,
    STATES,
    Entry,
    Journal,
    JournalBusy,
    JournalCorrupt,
    JournalUnavailable,
    _checksum,
    read_journal,
    set_aside,
)
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.provider import REMEMBERED_MAX
from statemachine.states import AllocationState
from tests.support.programs import run_program
from transport.calls import hook_syscalls

BOOT: Final = "7b5e1b2e-0000-4000-8000-000000000001"
OTHER_BOOT: Final = "7b5e1b2e-0000-4000-8000-000000000002"
ANCHOR: Final = {"boot_id": BOOT, "pid": 4711, "pidfs_inode": 99, "inodes": {"Pid": 1}}

TORN_WRITES: Final = 12
"""How many writers are killed; each at another point."""


def requested(allocation_id: str, image: str | None = None) -> Entry:
    namespaces = (NamespaceType.NET, NamespaceType.PID, NamespaceType.MOUNT)
    return Entry(
        allocation_id=allocation_id,
        incarnation=f"token-of-{allocation_id}",
        state=AllocationState.REQUESTED,
        request=NamespaceRequest(allocation_id, namespaces, image),
    )


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_basic(tmp_path: Path) -> None:
    entry = requested("alloc-42", "pytorch-2.5.sqfs")
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(entry)
        journal.publish(
            "alloc-42", AllocationState.CREATED, anchor=ANCHOR, scope_path="/cg/alloc-42.scope"
        )
        journal.publish(
            "alloc-42", AllocationState.HANDED_OFF, mount_path="/run/pact/uenv/pytorch-2.5"
        )
        journal.publish("alloc-42", AllocationState.ENDED, why="process 7 cannot die yet")
        (found,) = journal.entries()
        # What other versions of the provider read in the file.
        with closing(sqlite3.connect(tmp_path / JOURNAL_NAME)) as database:
            assert database.execute("SELECT state FROM allocation").fetchall() == [("ended",)]
        journal.forget("alloc-42")

        assert found == replace(
            entry,
            state=AllocationState.ENDED,
            mount_path="/run/pact/uenv/pytorch-2.5",
            anchor=ANCHOR,
            scope_path="/cg/alloc-42.scope",
            why="process 7 cannot die yet",
        )
        assert journal.entries() == ()
        assert journal.remembered() == ("alloc-42",)
    with Journal(tmp_path, BOOT) as journal:
        assert journal.remembered() == ("alloc-42",)


def test_entries_survive_the_journal_in_their_order(tmp_path: Path) -> None:
    names = ["zebra", "ant", "ümläut", "名前", "'; DROP TABLE allocation; --"]
    with Journal(tmp_path, BOOT) as journal:
        for name in names:
            journal.intend(requested(name))

    with Journal(tmp_path, BOOT) as journal:
        assert [entry.allocation_id for entry in journal.entries()] == names
        assert journal.entries() == tuple(requested(name) for name in names)


def test_a_field_can_be_taken_back(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
        journal.publish("alloc", AllocationState.ENDED, why="busy")
        journal.publish("alloc", AllocationState.ENDED, why=None)
        assert journal.entries()[0].why is None


def test_intending_twice_changes_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
        with pytest.raises(ValueError, match="already has an entry"):
            journal.intend(requested("alloc", "other.sqfs"))
        assert journal.entries() == (requested("alloc"),)


def test_a_state_never_goes_back(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
        journal.publish("alloc", AllocationState.ENDED)
        with pytest.raises(ValueError, match="it cannot become handed_off"):
            journal.publish("alloc", AllocationState.HANDED_OFF)
        assert journal.entries()[0].state is AllocationState.ENDED


def test_the_unknown_is_not_published_and_forgetting_it_remembers_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        with pytest.raises(KeyError):
            journal.publish("absent", AllocationState.CREATED)
        journal.forget("absent")
        assert journal.remembered() == ()


def test_text_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        with pytest.raises(ValueError, match="surrogates"):
            journal.intend(requested("\udc80"))
        journal.intend(requested("alloc"))
        assert journal.entries() == (requested("alloc"),)


@pytest.mark.clause("END-18")
def test_remembered_ends_are_bounded_and_the_oldest_goes_first(tmp_path: Path) -> None:
    surplus = 3
    names = [f"alloc-{number}" for number in range(REMEMBERED_MAX + surplus)]
    with Journal(tmp_path, BOOT) as journal:
        for name in names:
            journal.intend(requested(name))
            journal.forget(name)
        assert journal.remembered() == tuple(names[surplus:])


def test_an_id_that_ends_again_is_remembered_once_and_last(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        for name in ("first", "second", "first"):
            journal.intend(requested(name))
            journal.forget(name)
        assert journal.remembered() == ("second", "first")


@pytest.mark.parametrize("seed", range(10))
def test_its_file_has_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("linux.journal.REMEMBERED_MAX", 3)
    rng = random.Random(seed)
    for _ in range(10):
        with Journal(tmp_path, rng.choice([BOOT, BOOT, BOOT, OTHER_BOOT])) as journal:
            for _ in range(rng.randrange(10)):
                name = rng.choice(["one", "two", "three", "four", "five"])
                with suppress(KeyError, ValueError):
                    rng.choice(
                        [
                            lambda name: journal.intend(requested(name)),
                            lambda name: journal.publish(name, rng.choice(STATES), why=str(seed)),
                            journal.forget,
                        ]
                    )(name)
            said = (journal.entries(), journal.remembered(), journal.changes)
        view = read_journal(tmp_path)
        assert (view.entries, view.remembered, view.changes) == said


@pytest.mark.clause("CRASH-9")
def test_another_boot_voids_the_entries_and_remembers_their_ends(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("before"))
        journal.forget("before")
        journal.intend(requested("lost"))
    view = read_journal(tmp_path)
    assert (view.boot_id, view.entries) == (BOOT, (requested("lost"),))
    for _ in range(2):
        with Journal(tmp_path, OTHER_BOOT) as journal:
            assert journal.entries() == ()
            assert journal.remembered() == ("before", "lost")
    assert read_journal(tmp_path).boot_id == OTHER_BOOT


@pytest.mark.clause("CRASH-10")
def test_a_second_provider_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT):
        with pytest.raises(JournalBusy, match=f"process {os.getpid()} holds") as refusal:
            Journal(tmp_path, BOOT)
        assert refusal.value.holder_pid == os.getpid()
    Journal(tmp_path, BOOT).close()


def test_a_holder_that_has_not_written_its_pid_yet_is_still_a_holder(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT):
        (tmp_path / LOCK_NAME).write_bytes(b"")
        with pytest.raises(JournalBusy, match="another process holds"):
            Journal(tmp_path, BOOT)


@pytest.mark.clause("CRASH-17")
def test_a_journal_whose_file_is_another_is_lost(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        assert not journal.is_lost()
        shutil.copy(tmp_path / JOURNAL_NAME, tmp_path / "another")
        (tmp_path / "another").replace(tmp_path / JOURNAL_NAME)
        assert journal.is_lost()
        journal.make_again()
        assert not journal.is_lost()


@pytest.mark.clause("CRASH-10", "CRASH-17")
def test_a_lock_that_was_removed_is_taken_again(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("a"))
        (tmp_path / LOCK_NAME).unlink()
        assert journal.is_lost()
        journal.make_again()
        with pytest.raises(JournalBusy):
            Journal(tmp_path, BOOT)
        assert [entry.allocation_id for entry in journal.entries()] == ["a"]


def test_a_reader_sees_no_half_of_what_a_provider_changed_meanwhile(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("a"))
    queries: list[str] = []

    def change_once(
        call: Callable[..., Any], words: tuple[Any, ...], more: Mapping[str, Any]
    ) -> Any:
        if words and "FROM ended" in str(words[0]) and not queries:
            queries.append(words[0])
            with Journal(tmp_path, BOOT) as later:
                later.intend(requested("b"))
        return call(*words, **more)

    with hook_syscalls(change_once):
        view = read_journal(tmp_path)
    assert queries
    assert [entry.allocation_id for entry in view.entries] == ["a", "b"]


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, BOOT)
    journal.close()
    journal.close()
    with pytest.raises(sqlite3.ProgrammingError):
        journal.entries()


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    state_dir = tmp_path / "run" / "pact"
    Journal(state_dir, BOOT).close()
    assert state_dir.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalUnavailable, match="Not a directory"):
        Journal(tmp_path / "file" / "state", BOOT)


@pytest.mark.clause("CRASH-11")
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"this is no database, whatever its name says" * 100, id="foreign"),
        pytest.param(b"x", id="one-byte"),
        pytest.param(random.Random(7).randbytes(8192), id="random"),
    ],
)
def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(damage)
    for attempt in (lambda: Journal(tmp_path, BOOT), lambda: read_journal(tmp_path)):
        with pytest.raises(JournalCorrupt, match=JOURNAL_NAME):
            attempt()
    assert path.read_bytes() == damage


@pytest.mark.clause("CRASH-11")
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda page: bytes(b ^ 0x5A for b in page), id="overwritten"),
        pytest.param(lambda page: page[: len(page) // 2], id="truncated"),
    ],
)
def test_a_damaged_journal_is_refused_and_kept(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    with Journal(tmp_path, BOOT) as journal:
        for number in range(50):
            journal.intend(requested(f"alloc-{number}"))
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    damaged = whole[:4096] + damage(whole[4096:])
    path.write_bytes(damaged)
    for attempt in (lambda: Journal(tmp_path, BOOT), lambda: read_journal(tmp_path)):
        with pytest.raises(JournalCorrupt):
            attempt()
    assert path.read_bytes() == damaged


def test_a_file_that_was_damaged_after_kill_9_is_refused_by_readers(tmp_path: Path) -> None:
    killed_writer(tmp_path, 30)
    with sqlite3.connect(tmp_path / JOURNAL_NAME) as database:
        database.execute("UPDATE allocation SET state = 'almost'")
    with pytest.raises(JournalCorrupt):
        read_journal(tmp_path)
    database.close()


def test_an_empty_file_is_a_journal_that_was_never_begun(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b"")
    assert read_journal(tmp_path).entries == ()
    with Journal(tmp_path, BOOT) as journal:
        assert journal.entries() == ()


@pytest.mark.parametrize("version", [0, 1, 3])
def test_a_database_of_another_schema_is_refused_and_kept(tmp_path: Path, version: int) -> None:
    path = tmp_path / JOURNAL_NAME
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE of_another_program (column_)")
    database.execute(f"PRAGMA user_version = {version}")
    database.close()
    before = path.read_bytes()
    for attempt in (lambda: Journal(tmp_path, BOOT), lambda: read_journal(tmp_path)):
        with pytest.raises(JournalCorrupt, match=f"schema version {version}"):
            attempt()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("state", "almost"),
        ("request", "{"),
        ("request", "[]"),
        ("request", '{"allocation_id": 7, "namespaces": [], "uenv_image": null}'),
        ("request", '{"allocation_id": "a", "namespaces": ["Uts"], "uenv_image": null}'),
        ("anchor", "7"),
    ],
)
def test_an_entry_we_cannot_have_written_is_refused(tmp_path: Path, column: str, text: str) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
    with closing(sqlite3.connect(tmp_path / JOURNAL_NAME)) as database:
        database.execute(f"UPDATE allocation SET {column} = ?", (text,))
        row = database.execute(f"SELECT {_COLUMNS} FROM allocation").fetchone()
        database.execute("UPDATE allocation SET checksum = ?", (_checksum(*row[:-1]),))
        database.commit()
    for attempt in (lambda: Journal(tmp_path, BOOT), lambda: read_journal(tmp_path)):
        with pytest.raises(JournalCorrupt, match=r"'alloc' is unreadable: (?!its checksum)"):
            attempt()


@pytest.mark.clause("CRASH-18")
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE allocation SET incarnation = 'token-of-alloK'",
        "UPDATE allocation SET state = 'ended'",
        "UPDATE allocation SET scope_path = '/elsewhere'",
        "UPDATE ended SET allocation_id = 'gonE'",
        "UPDATE boot SET boot_id = '7b5e1b2e-0000-4000-8000-000000000003'",
        "UPDATE boot SET instance = 'another'",
        "UPDATE allocation SET change = 0",
        "UPDATE ended SET change = 9",
        "DELETE FROM boot",
    ],
)
def test_a_value_that_was_damaged_is_not_believed(tmp_path: Path, damage: str) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("gone"))
        journal.forget("gone")
        journal.intend(requested("alloc"))
    with closing(sqlite3.connect(tmp_path / JOURNAL_NAME)) as database:
        database.execute(damage)
        database.commit()
    with pytest.raises(JournalCorrupt, match=r"checksum is wrong|does not say of which boot"):
        Journal(tmp_path, BOOT)


def test_changes_are_counted_and_told_when_they_are_done(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with Journal(tmp_path, BOOT) as journal:
        journal.on_change = lambda changes: told.append((changes, read_changes(tmp_path)))
        journal.intend(requested("alloc"))
        journal.publish("alloc", AllocationState.ENDED)
        journal.count_from(7)
        journal.count_from(3)
        journal.forget("alloc")
        journal.forget("alloc")
        with pytest.raises(KeyError):
            journal.publish("alloc", AllocationState.ENDED)
    assert told == [(1, 1), (2, 2), (8, 8)]
    with Journal(tmp_path, BOOT) as journal:
        assert journal.changes == 8


def read_changes(state_dir: Path) -> int:
    # In another process: within one, SQLite would share the writer's state with the reader.
    script = (
        "import sys; from pathlib import Path; from linux.journal import read_journal;"
        "print(read_journal(Path(sys.argv[1])).changes)"
    )
    return int(run_program(sys.executable, "-c", script, state_dir).stdout)


def test_a_copy_is_known_as_one_and_keeps_its_instance(tmp_path: Path) -> None:
    with Journal(tmp_path / "state", BOOT) as journal:
        journal.intend(requested("alloc"))
        assert not journal.is_copy
        instance = journal.instance
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    with Journal(tmp_path / "copy", BOOT) as copy:
        assert (copy.is_copy, copy.instance) == (True, instance)
    with Journal(tmp_path / "copy", BOOT) as copy:
        assert not copy.is_copy
    with Journal(tmp_path / "state", BOOT) as journal:
        assert (journal.is_copy, journal.instance) == (False, instance)
    # After a reboot nothing is bound any more.
    with Journal(tmp_path / "copy", OTHER_BOOT) as copy:
        assert (copy.is_copy, copy.instance) == (False, instance_of(tmp_path / "copy"))


def test_setting_aside_keeps_everything(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        (tmp_path / JOURNAL_NAME).write_bytes(content)
        (tmp_path / f"{JOURNAL_NAME}-wal").write_bytes(content)
        moved = set_aside(tmp_path)
        assert [path.read_bytes() for path in moved] == [content, content]
    assert set_aside(tmp_path) == []
    assert len(listing(tmp_path)) == 4


def test_a_write_that_finds_no_room_leaves_the_entry_as_it_was(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
        # As full as a file system can be, for this one database.
        journal._database.execute("PRAGMA max_page_count = 1")
        with pytest.raises(JournalUnavailable, match="full"):
            journal.publish("alloc", AllocationState.ENDED, why="x" * 100_000)
        assert journal.entries() == (requested("alloc"),)
        journal.publish("alloc", AllocationState.ENDED)
        assert journal.entries()[0].state is AllocationState.ENDED


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    threads, each = 8, 25
    with Journal(tmp_path, BOOT) as journal:

        def live(worker: int) -> None:
            for number in range(each):
                name = f"{worker}-{number}"
                journal.intend(requested(name))
                journal.publish(name, AllocationState.CREATED, anchor=ANCHOR)
                if number % 2:
                    journal.forget(name)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(live, range(threads)))
        assert len(journal.remembered()) == threads * (each // 2)
        assert {entry.state for entry in journal.entries()} == {AllocationState.CREATED}
        assert len(journal.entries()) == threads * (each - each // 2)


# --- reading -----------------------------------------------------------------------------------


def test_reading_where_nothing_is_makes_nothing(tmp_path: Path) -> None:
    view = read_journal(tmp_path / "absent")
    assert (view.boot_id, view.entries, view.remembered) == (None, (), ())
    assert listing(tmp_path) == []


def test_reading_beside_the_provider_sees_its_last_word(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
        journal.intend(requested("over"))
        journal.forget("over")
        before = listing(tmp_path)
        view = read_journal(tmp_path)
        assert (view.boot_id, view.entries) == (BOOT, (requested("alloc"),))
        assert view.remembered == ("over",)
        assert listing(tmp_path) == before


def test_reading_after_the_provider_closed_leaves_the_directory_alone(tmp_path: Path) -> None:
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
    before = listing(tmp_path)
    assert read_journal(tmp_path).entries == (requested("alloc"),)
    assert listing(tmp_path) == before == [JOURNAL_NAME, LOCK_NAME]


def test_readers_see_whole_transactions_while_a_writer_writes(tmp_path: Path) -> None:
    """An allocation is live or remembered, and never both or neither."""
    writes = 300
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))

        def write() -> None:
            for _ in range(writes):
                journal.forget("alloc")
                journal.intend(requested("alloc"))

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(write)
            views = [read_journal(tmp_path)]
            while not writer.done():
                views.append(read_journal(tmp_path))
            writer.result()
    for view in views:
        assert view.boot_id == BOOT
        assert view.entries in ((), (requested("alloc"),))
        assert view.entries or view.remembered == ("alloc",)


PROVIDERS: Final = """
import sys
from pathlib import Path
from linux.journal import Journal
from statemachine.states import AllocationState

for _ in range(60):
    with Journal(Path(sys.argv[1]), sys.argv[2]) as journal:
        journal.publish("alloc", AllocationState.REQUESTED, why="again")
"""


def test_readers_hold_while_providers_come_and_go(tmp_path: Path) -> None:
    """A reader that cannot get a clean view says so; it never sees half of one."""
    with Journal(tmp_path, BOOT) as journal:
        journal.intend(requested("alloc"))
    providers = run_beside(PROVIDERS, tmp_path)
    seen = 0
    with providers:
        while providers.poll() is None:
            try:
                view = read_journal(tmp_path)
            except JournalUnavailable:
                continue
            assert [entry.allocation_id for entry in view.entries] == ["alloc"]
            seen += 1
    assert providers.returncode == 0
    assert seen > 0


# --- death -------------------------------------------------------------------------------------

WRITER: Final = """
import sys
from pathlib import Path
from linux.journal import Entry, Journal
from statemachine.states import AllocationState
from statemachine.messages import NamespaceRequest

journal = Journal(Path(sys.argv[1]), sys.argv[2])
number = 0
while True:
    name = f"alloc-{number}"
    journal.intend(Entry(name, "token", AllocationState.REQUESTED, NamespaceRequest(name, ())))
    print("intended", number, flush=True)
    journal.publish(name, AllocationState.CREATED, anchor={"pid": number})
    print("created", number, flush=True)
    if number % 3 == 0:
        journal.forget(name)
        print("forgotten", number, flush=True)
    number += 1
"""


def run_beside(program: str, state_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(state_dir), BOOT],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def killed_writer(state_dir: Path, lines: int) -> list[str]:
    """Start a writer, kill it after so many lines, and return all that it has said."""
    writer = run_beside(WRITER, state_dir)
    assert writer.stdout is not None
    with writer, writer.stdout:
        said = [writer.stdout.readline() for _ in range(lines)]
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.readlines()
    return [line.strip() for line in said]


@pytest.mark.parametrize("seed", range(TORN_WRITES))
def test_whatever_was_written_survives_kill_9(tmp_path: Path, seed: int) -> None:
    said = killed_writer(tmp_path, random.Random(seed).randrange(1, 120))
    promised = {int(line.split()[1]): line.split()[0] for line in said if line.count(" ") == 1}
    before = listing(tmp_path)
    view = read_journal(tmp_path)
    assert listing(tmp_path) == before

    with Journal(tmp_path, BOOT) as journal:
        assert (view.entries, view.remembered) == (journal.entries(), journal.remembered())
        found = {entry.allocation_id: entry for entry in journal.entries()}
        over = set(journal.remembered())
        journal.intend(requested("and it can be written again"))

    last = max(promised)
    for number, word in promised.items():
        name = f"alloc-{number}"
        assert (name in found) != (name in over)
        if word == "forgotten":
            assert name in over
        elif word == "created" and name in found:
            assert found[name].state is AllocationState.CREATED
            assert found[name].anchor == {"pid": number}
    # At most the one step that was under way when it died is there without having been reported.
    assert set(found) | over <= {f"alloc-{number}" for number in range(last + 2)}


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    killed_writer(tmp_path, 1)
    Journal(tmp_path, BOOT).close()
