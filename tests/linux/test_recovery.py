"""What a starting provider does with what it finds, row by row, on the real kernel."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from linux.anchor import ANCHOR_VARIABLE, Anchor, boot_id
from linux.backend import LOOKS_MAX, LinuxBackend, NodeSettings
from linux.cgroups import (
    ALLOCATION_ATTRIBUTE,
    DEFAULT_PLACE,
    OWNER_ATTRIBUTE,
    SCOPE_MODE,
    STATE_ATTRIBUTE,
    WORKLOAD_SLICE,
    DescribedScope,
    Scope,
    ScopeError,
    anchor_path,
    remove_cgroup,
)
from linux.cli.place import PlaceWatch
from linux.features import Features
from linux.instance import (
    CHANGES_ATTRIBUTE,
    PROVIDER_ATTRIBUTE,
    Instance,
    InstanceBusy,
    instance_of,
    is_locked,
    new_own_token,
    provider_of,
    scope_parents_of,
)
from linux.journal import (
    JOURNAL_NAME,
    Entry,
    Journal,
    JournalBusy,
    JournalCorrupt,
    JournalUnavailable,
    encode_request,
    set_aside,
)
from linux.recovery import (
    ENDED_MARK,
    ROWS,
    Action,
    Init,
    ScopeSeen,
    Store,
    Verdict,
    decide,
    describe,
    find_cases,
    read_description,
)
from linux.survey import survey_node
from linux.syscalls import pidfd_open
from linux.testing.worlds import LIGHT, LinuxWorld, real
from statemachine.errors import CreationFailed
from statemachine.messages import NamespaceRequest
from statemachine.states import AllocationState
from tests.support.forging import process_state
from tests.support.programs import run_program
from transport.calls import hook_syscalls
from transport.contract import Adoption, Sighting
from transport.testing.peer import wait_until

ROOT: Final = Path(__file__).resolve().parents[2]

ATTRIBUTES_MAX: Final = 128
"""Most extended attributes that the Linux kernel keeps of a cgroup (kernfs)."""

NOTHING: Final = {
    # Where no scopes are made there is no cgroup of anchors either.
    *((store, Init.HERE, ScopeSeen.NOT_MADE) for store in Store),
    # With neither entry nor scope, only the anchors' cgroup leads to an incarnation.
    *(
        (Store.NONE, init, seen)
        for init in (Init.ELSEWHERE, Init.DEAD, Init.UNSEEN)
        for seen in (ScopeSeen.NOT_MADE, ScopeSeen.GONE)
    ),
    # What has an entry needs no description.
    *(
        (store, init, ScopeSeen.UNDESCRIBED)
        for store in (Store.REQUESTED, Store.MADE, Store.ENDED)
        for init in Init
    ),
}
"""Combinations that cannot be found."""

FACTS: Final = [
    facts for facts in itertools.product(Store, Init, ScopeSeen) if facts not in NOTHING
]


def name_of(facts: tuple[Store, Init, ScopeSeen]) -> str:
    return "-".join(fact.name.lower().replace("_", "-") for fact in facts)


# --- The table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", FACTS, ids=name_of)
def test_basic_each_combination_is_in_one_row(facts: tuple[Store, Init, ScopeSeen]) -> None:
    rows = [row for row in ROWS if all(map(lambda f, column: f in column, facts, row[:3]))]
    assert rows == [decide(*facts)]


def may_be_alive(store: Store, init: Init, scope: ScopeSeen) -> bool:
    """By the rules of chapters 6 and 7 alone, whatever the table says."""
    if init is Init.UNSEEN:
        return True
    if store is Store.ENDED or scope is ScopeSeen.ENDED:
        return False  # END-14: an end is recorded before it is announced
    was_answered = store is Store.MADE or scope in (
        ScopeSeen.UNUSED,
        ScopeSeen.BUSY,
        ScopeSeen.OVER,
    )
    if store is Store.NONE and scope in (ScopeSeen.ENTERED, ScopeSeen.BUSY):
        return True  # processes, and nothing that says that they are over
    if init is Init.ELSEWHERE or scope is ScopeSeen.UNDESCRIBED:
        return True
    if init is Init.DEAD or scope is ScopeSeen.GONE:
        return (
            False  # END-4: the init is dead, or the scope was removed, as only an empty one can be
        )
    return was_answered


@pytest.mark.clause("CRASH-16")
@pytest.mark.parametrize("facts", FACTS, ids=name_of)
def test_no_row_releases_what_may_be_alive(facts: tuple[Store, Init, ScopeSeen]) -> None:
    row = decide(*facts)
    assert not (row.action is Action.RELEASE and may_be_alive(*facts))
    assert not (row.action is Action.RELEASE and row.verdict is not Verdict.DEAD)


def test_what_cannot_be_is_in_no_row() -> None:
    with pytest.raises(LookupError):
        decide(Store.NONE, Init.DEAD, ScopeSeen.GONE)


# --- Each row on this kernel -------------------------------------------------------------------


@dataclass
class Settled:
    """What became of one combination after a provider started on it."""

    adoption: Adoption | None
    is_init_alive: bool
    has_scope: bool
    is_member_alive: bool | None
    refusal: str | None = None
    """Why an allocation of the same name cannot be made, if it cannot."""


ON_NODE: Final = [
    facts for facts in FACTS if facts[1] is not Init.UNSEEN and facts[2] is not ScopeSeen.NOT_MADE
]


@pytest.fixture(scope="module")
def settled(
    tmp_path_factory: pytest.TempPathFactory, cgroup2: Path, image_root: Path
) -> Iterator[dict[tuple[Store, Init, ScopeSeen], Settled]]:
    """One provider that starts on every combination at once."""
    elsewhere = cgroup2 / f"nsh-recovery-{os.getpid()}"
    elsewhere.mkdir()
    try:
        with real(tmp_path_factory.mktemp("rows"), cgroup2, image_root) as world:
            yield settle_all(world, elsewhere)
    finally:
        wait_until(lambda: remove_cgroup(elsewhere))


def settle_all(world: LinuxWorld, elsewhere: Path) -> dict[tuple[Store, Init, ScopeSeen], Settled]:
    names = {facts: f"nsh-{os.getpid()}-{name_of(facts)}" for facts in ON_NODE}
    inits = {facts: prepare(world, names[facts], facts, elsewhere) for facts in ON_NODE}
    world.backend.close()
    rewrite_journal(world, names)
    adoptions = {it.request.allocation_id: it for it in world.start().adoptions}
    for name, adoption in adoptions.items():
        if adoption.state is AllocationState.ENDED:
            world.release(name)
    found: dict[tuple[Store, Init, ScopeSeen], Settled] = {}
    for facts, name in names.items():
        members = world._members.get(name, [])
        found[facts] = Settled(
            adoptions.get(name),
            is_alive(inits[facts]),
            world.scope(name).exists(),
            members[-1].poll() is None if members else None,
        )
        if decide(*facts).action is Action.KEEP:
            with pytest.raises(CreationFailed) as caught:
                world.backend.create_namespaces(NamespaceRequest(name, LIGHT))
            found[facts].refusal = caught.value.reason
    tidy_up(world, names, inits)
    return found


def prepare(
    world: LinuxWorld, name: str, facts: tuple[Store, Init, ScopeSeen], elsewhere: Path
) -> int:
    """Make an allocation, and bring its init and its scope into the wanted state."""
    _, init, seen = facts
    world.backend.create_namespaces(NamespaceRequest(name, LIGHT))
    pid = world.init_of(name)
    if seen in (ScopeSeen.ENTERED, ScopeSeen.BUSY, ScopeSeen.ENDED):
        world.join(name)
    if seen is ScopeSeen.OVER:
        world.pass_through(name)
        wait_until(
            lambda: (
                Scope.open(world._cgroup2, name, world.program_now._find(name).token) is not None
                and "usage_usec 0" not in (world.scope(name) / "cpu.stat").read_text()
            )
        )
    if seen in (ScopeSeen.UNMARKED, ScopeSeen.ENTERED):
        os.removexattr(world.scope(name), STATE_ATTRIBUTE)
    if seen is ScopeSeen.ENDED:
        os.setxattr(world.scope(name), STATE_ATTRIBUTE, ENDED_MARK.encode())
    if seen is ScopeSeen.UNDESCRIBED:
        os.removexattr(world.scope(name), ALLOCATION_ATTRIBUTE)
    if seen is ScopeSeen.GONE:
        world.remove_scope(name)
    if init is Init.ELSEWHERE:
        (elsewhere / "cgroup.procs").write_text(str(pid))
    if init is Init.DEAD:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
    return pid


def rewrite_journal(world: LinuxWorld, names: dict[tuple[Store, Init, ScopeSeen], str]) -> None:
    with Journal(world.state_dir, boot_id()) as journal:
        for (store, _, _), name in names.items():
            entry = journal.find(name)
            assert entry is not None
            if store is Store.ENDED:
                journal.publish(name, AllocationState.ENDED)
            if store in (Store.NONE, Store.REQUESTED):
                journal.forget(name)
            if store is Store.REQUESTED:
                journal.intend(
                    replace(entry, state=AllocationState.REQUESTED, anchor=None, scope_path=None)
                )


def is_alive(pid: int) -> bool:
    return process_state(pid) not in ("", "Z")


def tidy_up(
    world: LinuxWorld,
    names: dict[tuple[Store, Init, ScopeSeen], str],
    inits: dict[tuple[Store, Init, ScopeSeen], int],
) -> None:
    for facts, name in names.items():
        for process in world._members.pop(name, []):
            process.kill()
            process.wait()
        if decide(*facts).action is Action.KEEP:
            if is_alive(inits[facts]):
                os.kill(inits[facts], signal.SIGKILL)
            wait_until(lambda facts=facts: not is_alive(inits[facts]))  # type: ignore[misc]
            wait_until(lambda name=name: remove_cgroup(world.scope(name)))  # type: ignore[misc]
    world.backend.close()
    with Journal(world.state_dir, boot_id()) as journal:
        for facts, name in names.items():
            if decide(*facts).action is Action.KEEP:
                journal.forget(name)
    world.start()


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-16")
@pytest.mark.parametrize("facts", ON_NODE, ids=name_of)
def test_each_row_is_done_on_this_kernel(
    facts: tuple[Store, Init, ScopeSeen],
    settled: dict[tuple[Store, Init, ScopeSeen], Settled],
) -> None:
    store, init, seen = facts
    row, what = decide(*facts), settled[facts]
    has_scope = seen is not ScopeSeen.GONE
    if row.action is Action.ADOPT:
        assert what.adoption is not None
        assert what.adoption.state is AllocationState.CREATED
        assert what.adoption.request == NamespaceRequest(what.adoption.request.allocation_id, LIGHT)
        assert (what.is_init_alive, what.has_scope) == (True, has_scope)
        assert what.is_member_alive in (None, True)
    elif row.action is Action.RELEASE:
        # Of what has neither entry nor scope there is nothing to go on with: its init is ended.
        is_known = store is not Store.NONE or has_scope
        assert (what.adoption is not None) is is_known
        assert what.adoption is None or what.adoption.state is AllocationState.ENDED
        assert (what.is_init_alive, what.has_scope) == (False, False)
        assert what.is_member_alive in (None, False)
    else:
        assert what.adoption is None
        assert (what.is_init_alive, what.has_scope) == (init is not Init.DEAD, has_scope)
        assert what.is_member_alive in (None, True)
        assert "doctor" in str(what.refusal)


# --- A journal that is damaged, lost or older --------------------------------------------------

LIVING: Final = 6
FLIPS: Final = 16
"""At how many offsets of each file one bit is flipped."""


@dataclass
class Jobs:
    """Living allocations with processes, and the files that their provider left when it died."""

    world: LinuxWorld
    names: list[str]
    inits: list[int]
    processes: list[subprocess.Popen[bytes]]
    files: dict[str, bytes]
    """All of the journal's files as they were when the provider died."""
    changes: bytes
    """What was noted outside of them."""

    def lay_out(self, files: dict[str, bytes]) -> None:
        """Leave these files in the state directory, as if their provider had died just now."""
        self.world.backend.close()
        for path in self.world.state_dir.glob(f"{JOURNAL_NAME}*"):
            path.unlink()
        for name, content in files.items():
            (self.world.state_dir / name).write_bytes(content)
        os.setxattr(self.world.anchors_cgroup, CHANGES_ATTRIBUTE, self.changes)

    def start(self) -> bool:
        """Start a provider, as an operator does; say whether it refused the journal at first."""
        try:
            adoptions, is_refused = self.world.start().adoptions, False
        except JournalCorrupt:
            set_aside(self.world.state_dir)
            adoptions, is_refused = self.world.start().adoptions, True
        assert sorted(it.request.allocation_id for it in adoptions) == sorted(self.names)
        assert {it.state for it in adoptions} <= {
            AllocationState.CREATED,
            AllocationState.HANDED_OFF,
        }
        assert [self.world.init_of(name) for name in self.names] == self.inits
        assert [process.poll() for process in self.processes] == [None] * LIVING
        return is_refused


@pytest.fixture(params=["killed", "stopped"])
def jobs(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
) -> Iterator[Jobs]:
    """The provider was killed, and its journal has a log; or it was stopped, and it has none."""
    with real(tmp_path, cgroup2, image_root) as world:
        names = [f"{allocation_id}-{number}" for number in range(LIVING)]
        for name in names:
            world.backend.create_namespaces(NamespaceRequest(name, LIGHT, "hello.sqfs"))
            world.backend.record_handed_off(name)
            world.join(name)
        inits = [world.init_of(name) for name in names]
        processes = [world._members[name][-1] for name in names]
        if request.param == "stopped":
            world.backend.close()
        files = {path.name: path.read_bytes() for path in world.state_dir.glob(f"{JOURNAL_NAME}*")}
        changes = os.getxattr(world.anchors_cgroup, CHANGES_ATTRIBUTE)
        yield Jobs(world, names, inits, processes, files, changes)
        for name, process in zip(names, processes, strict=True):
            world.release(name)
            assert process.wait(10) == -signal.SIGKILL
            world._members.pop(name)
        # No id is blocked for ever.
        for name in names:
            world.backend.create_namespaces(NamespaceRequest(name, LIGHT))
            world.release(name)


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-16")
def test_a_flipped_bit_kills_no_job(jobs: Jobs) -> None:
    for name, content in jobs.files.items():
        if name.endswith("-shm"):
            continue  # the index of the log, which SQLite makes anew
        for offset in sample(len(content)):
            damaged = bytearray(content)
            damaged[offset] ^= 1 << offset % 8
            jobs.lay_out({**jobs.files, name: bytes(damaged)})
            jobs.start()


def sample(length: int) -> list[int]:
    return sorted(random.Random(length).sample(range(length), min(FLIPS, length)))


def cut_to_half(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content[: len(content) // 2] for name, content in files.items()}


def emptied(files: dict[str, bytes]) -> dict[str, bytes]:
    return dict.fromkeys(files, b"")


def without_log(files: dict[str, bytes]) -> dict[str, bytes]:
    return {JOURNAL_NAME: files[JOURNAL_NAME]}


def without_journal(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != JOURNAL_NAME}


def moved_away(_: dict[str, bytes]) -> dict[str, bytes]:
    return {}


@pytest.mark.sample(3)
@pytest.mark.needs_root
@pytest.mark.clause("CRASH-16", "CRASH-18")
@pytest.mark.parametrize("damage", [cut_to_half, emptied, without_log, without_journal, moved_away])
def test_a_journal_that_is_lost_kills_no_job(
    jobs: Jobs,
    damage: Callable[[dict[str, bytes]], dict[str, bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    left = damage(jobs.files)
    jobs.lay_out(left)
    is_refused = jobs.start()
    is_whole = left.get(JOURNAL_NAME) == jobs.files[JOURNAL_NAME] and len(jobs.files) == 1
    events = {getattr(record, "event", "") for record in caplog.records}
    # It is noticed, one way or the other.
    assert is_whole is not (is_refused or "journal_incomplete" in events)


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-16", "CRASH-18")
def test_an_older_journal_that_was_put_back_kills_no_job(
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended, renewed, later = (f"{allocation_id}-{word}" for word in ("ended", "renewed", "later"))
    with real(tmp_path, cgroup2, image_root) as world:
        for name in (ended, renewed):
            world.backend.create_namespaces(NamespaceRequest(name, LIGHT))
        world.backend.close()
        older = (world.state_dir / JOURNAL_NAME).read_bytes()
        world.start()
        world.release(renewed)
        for name in (renewed, later):
            world.backend.create_namespaces(NamespaceRequest(name, LIGHT))
            world.join(name)
        inits = {name: world.init_of(name) for name in (renewed, later)}
        world.backend.record_ended(ended)
        world.backend.close()
        newer = (world.state_dir / JOURNAL_NAME).read_bytes()
        (world.state_dir / JOURNAL_NAME).write_bytes(older)
        caplog.clear()
        found = {it.request.allocation_id: it.state for it in world.start().adoptions}
        assert found == {
            ended: AllocationState.ENDED,
            renewed: AllocationState.CREATED,
            later: AllocationState.CREATED,
        }
        assert {name: world.init_of(name) for name in inits} == inits
        assert "journal_incomplete" in {getattr(it, "event", "") for it in caplog.records}
        world.restart()
        caplog.clear()
        world.restart()
        assert caplog.records == []
        # The one that was replaced is the older one now.
        world.backend.close()
        (world.state_dir / JOURNAL_NAME).write_bytes(newer)
        world.start()
        assert "journal_incomplete" in {getattr(it, "event", "") for it in caplog.records}


@pytest.mark.needs_root
@pytest.mark.clause("END-14")
def test_an_end_is_recorded_though_the_journal_cannot_be_written(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    with real(tmp_path, cgroup2, image_root) as world:
        world.backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
        journal = world.program_now._journal
        assert journal is not None
        journal._database.execute("PRAGMA query_only = 1")  # as on a full disk
        world.backend.record_ended(allocation_id)
        journal._database.execute("PRAGMA query_only = 0")
        entry = world.entry(allocation_id)
        assert entry is not None
        assert entry.state is AllocationState.CREATED
        (seen,) = survey_node(world.state_dir, Features.probe()).allocations
        assert seen.entry.state is AllocationState.ENDED
        (adoption,) = world.restart().adoptions
        assert adoption.state is AllocationState.ENDED


@pytest.mark.needs_root
@pytest.mark.clause("END-14")
def test_an_end_is_recorded_though_the_scope_cannot_be_marked(
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with real(tmp_path, cgroup2, image_root) as world:
        world.backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
        with monkeypatch.context() as patched:
            patched.setattr(os, "setxattr", refuse)
            world.backend.record_ended(allocation_id)
        (adoption,) = world.restart().adoptions
        assert adoption.state is AllocationState.ENDED


@pytest.mark.needs_root
@pytest.mark.clause("END-14")
def test_an_end_is_journaled_before_the_scope_that_it_is_marked_on_is_removed(
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If its init lives on: if that is exiting, nothing else would prove the end."""
    monkeypatch.setattr(LinuxBackend, "_note_why", lambda *_: None)
    with real(tmp_path, cgroup2, image_root) as world:
        world.backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
        world.block_release(allocation_id)
        try:
            world.backend.record_ended(allocation_id)
            world.backend.release_namespaces(allocation_id)
            assert not world.scope(allocation_id).exists()
            entry = world.entry(allocation_id)
            assert entry is not None
            assert entry.state is AllocationState.ENDED
        finally:
            world.unblock_release(allocation_id)


REQUEST: Final = encode_request(NamespaceRequest("alloc", LIGHT))


@pytest.mark.parametrize(
    ("instance", "request_text"),
    [
        ("a\0b", REQUEST),
        ("../elsewhere", REQUEST),
        ("mine", REQUEST.replace('"alloc"', '""')),
        ("mine", REQUEST.replace('"alloc"', '"../alloc"')),
        ("mine", REQUEST.replace('"alloc"', "7")),
        ("mine", REQUEST.replace("null", '"/absolute"')),
        ("mine", "[" * 10_000),
    ],
)
def test_a_description_that_no_provider_wrote_says_nothing(
    instance: str, request_text: str
) -> None:
    assert read_description(describe("mine", NamespaceRequest("alloc", LIGHT))) is not None
    text = json.dumps({"instance": instance, "request": request_text})
    assert read_description(text) is None


@pytest.mark.needs_root
def test_what_was_opened_before_an_entry_that_cannot_be_read_is_closed() -> None:
    features = Features.probe()
    with (
        subprocess.Popen(["sleep", "infinity"], env={ANCHOR_VARIABLE: "token"}) as process,
        Anchor(process.pid, pidfd_open(process.pid), "token") as anchor,
    ):
        identity = anchor.identity(features).as_json()
        request = NamespaceRequest("alloc", LIGHT)
        readable = Entry("alloc", "token", AllocationState.CREATED, request, anchor=identity)
        entries = (readable, replace(readable, incarnation="other", anchor={"pid": 1}))
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ValueError, match="of an anchor's identity") as caught:
            find_cases(entries, "instance", None, features)
        assert (os.listdir("/proc/self/fd"), caught.tb is None) == (before, False)
        process.kill()


@pytest.mark.needs_root
def test_a_scope_that_is_removed_while_it_is_looked_for_is_nothing(
    cgroup2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = DEFAULT_PLACE.path_of(cgroup2, "gone")
    seen = DescribedScope(path, "token", describe("instance", NamespaceRequest("gone", LIGHT)))
    monkeypatch.setattr("linux.recovery.described_scopes", lambda *_: [seen])
    assert find_cases((), "instance", cgroup2, Features.probe()) == []


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-16")
def test_a_scope_that_a_consumer_has_claimed_is_no_providers_whatever_it_says(
    cgroup2: Path, allocation_id: str
) -> None:
    """A provider has described it, and died before it owned it."""
    path = DEFAULT_PLACE.path_of(cgroup2, allocation_id)
    path.parent.mkdir(exist_ok=True)
    path.mkdir(SCOPE_MODE)
    path.chmod(SCOPE_MODE)
    described = describe("instance", NamespaceRequest(allocation_id, LIGHT))
    os.setxattr(path, ALLOCATION_ATTRIBUTE, described.encode())
    scope = Scope.create(cgroup2, allocation_id, new_own_token())
    try:
        assert find_cases((), "instance", cgroup2, Features.probe()) == []
    finally:
        assert scope.remove()


# --- Whose state directory it is ---------------------------------------------------------------


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-15")
@pytest.mark.parametrize("is_anew", [True, False], ids=["made anew", "copied"])
def test_a_second_provider_has_no_power_over_the_first(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str, is_anew: bool
) -> None:
    with real(tmp_path / "one", cgroup2, image_root) as world:
        world.backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
        before = world.identities(allocation_id)
        second = LinuxWorld(tmp_path / "other", cgroup2, image_root)
        if is_anew:
            kept = world.state_dir.rename(tmp_path / "kept")
            second.state_dir = world.state_dir
        else:
            shutil.copytree(world.state_dir, second.state_dir)
        with pytest.raises(InstanceBusy, match=f"process {os.getpid()}, whose state directory"):
            second.launch()
        if is_anew:
            shutil.rmtree(world.state_dir)
            kept.rename(world.state_dir)
        assert world.identities(allocation_id) == before
        # Once the first is gone, the allocations are there for the next one.
        world.backend.close()
        if not is_anew:
            assert [it.state for it in second.start().adoptions] == [AllocationState.CREATED]
            assert second.identities(allocation_id) == before
            second.backend.close()
        world.start()


KILLED_WHILE_IT_STARTS_ANOTHER: Final = """
import os, signal, sys, time
from pathlib import Path
from linux.instance import Instance
from linux.journal import Journal
state_dir, root = map(Path, sys.argv[1:3])
journal = Journal(state_dir, "boot")
instance = Instance.lock(root, journal.instance, state_dir)
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(writing)
    os.read(reading, 1)  # until the other one is dead
    {"anchors": journal._lock, "journal": instance}[sys.argv[3]].close()
    print(flush=True)
    time.sleep(0.5)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-10", "CRASH-15")
@pytest.mark.parametrize("lock", ["journal", "anchors"])
def test_a_lock_that_a_killed_provider_has_left_to_a_child_is_waited_for(
    tmp_path: Path, cgroup2: Path, image_root: Path, lock: str
) -> None:
    world = LinuxWorld(tmp_path, cgroup2, image_root)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_IT_STARTS_ANOTHER, world.state_dir, cgroup2, lock],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"\n"
        assert killed.wait() == -signal.SIGKILL
        assert (lock == "anchors") is is_locked(cgroup2, instance_of(world.state_dir))
        world.start()
        world.close()


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-15")
def test_an_instance_is_locked_while_its_provider_runs(cgroup2: Path, tmp_path: Path) -> None:
    name = f"nsh-instance-{os.getpid()}"
    with Instance.lock(cgroup2, name, tmp_path) as instance:
        assert is_locked(cgroup2, name)
        with pytest.raises(InstanceBusy):
            Instance.lock(cgroup2, name, tmp_path)
        instance.path.rmdir()
        assert instance.is_lost()
        instance.make_again()
        assert not instance.is_lost()
        assert is_locked(cgroup2, name)
    assert not is_locked(cgroup2, name)
    instance.path.rmdir()
    assert not is_locked(cgroup2, name)


@pytest.mark.needs_root
def test_a_provider_that_cannot_tidy_up_at_its_end_unlocks_its_instance(
    tmp_path: Path, cgroup2: Path, image_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with real(tmp_path, cgroup2, image_root) as world:

        def refuse(
            call: Callable[..., Any], words: tuple[Any, ...], more: Mapping[str, Any]
        ) -> Any:
            if call is os.rmdir and words[0] == world.anchors_cgroup:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*words, **more)

        with hook_syscalls(refuse):
            world.backend.close()
        assert "stays: rmdir(2): EIO" in caplog.text
        assert not is_locked(cgroup2, instance_of(world.state_dir))
        world.start()


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-15")
def test_a_cgroup_that_was_made_anew_before_it_was_locked_is_locked(
    cgroup2: Path, tmp_path: Path
) -> None:
    name = f"nsh-instance-{os.getpid()}"
    path = anchor_path(cgroup2, name)
    flocks: list[Any] = []

    def replace_once(
        call: Callable[..., Any], words: tuple[Any, ...], more: Mapping[str, Any]
    ) -> Any:
        if call is fcntl.flock and not flocks:
            flocks.append(words)
            path.rmdir()
            path.mkdir()
        return call(*words, **more)

    with hook_syscalls(replace_once):
        instance = Instance.lock(cgroup2, name, tmp_path)
    with instance:
        assert flocks
        assert not instance.is_lost()
        assert is_locked(cgroup2, name)
    path.rmdir()


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-16")
def test_where_scopes_can_be_is_noted_before_any_is_made(cgroup2: Path, tmp_path: Path) -> None:
    name = f"nsh-instance-{os.getpid()}"
    with Instance.lock(cgroup2, name, tmp_path, "jobs.slice"):
        pass
    with Instance.lock(cgroup2, name, tmp_path, "more.slice/jobs") as instance:
        everywhere = {WORKLOAD_SLICE, "jobs.slice", "more.slice/jobs"}
        assert scope_parents_of(cgroup2, name) == everywhere
        instance.path.rmdir()
        instance.make_again()
        assert scope_parents_of(cgroup2, name) == everywhere
    for other in (b"[]", b"{}", b"7", b"not JSON"):
        os.setxattr(instance.path, PROVIDER_ATTRIBUTE, other)
        assert provider_of(cgroup2, name) is None
    os.removexattr(instance.path, PROVIDER_ATTRIBUTE)
    for number in range(ATTRIBUTES_MAX):
        os.setxattr(instance.path, f"user.other{number}", b"")
    # One that looks for them in the default place only would take what is alive for dead.
    with pytest.raises(ScopeError, match=r"setxattr\(2\): ENOSPC"):
        Instance.lock(cgroup2, name, tmp_path, "jobs.slice")
    assert not is_locked(cgroup2, name)
    with Instance.lock(cgroup2, name, tmp_path):
        pass
    instance.path.rmdir()


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-17")
def test_what_was_removed_under_a_provider_is_made_again(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    with real(tmp_path, cgroup2, image_root) as world:
        backend = world.program_now
        assert backend.hold_place() == []
        world.anchors_cgroup.rmdir()
        assert backend.hold_place() == ["the anchors' cgroup was removed"]
        world.anchors_cgroup.rmdir()
        # A creation does not wait for the next look.
        backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
        before = world.identities(allocation_id)
        shutil.rmtree(world.state_dir)
        assert backend.hold_place() == ["the journal of 1 allocations was removed"]
        assert backend.hold_place() == []
        backend.record_handed_off(allocation_id)
        for path in world.state_dir.glob(f"{JOURNAL_NAME}*"):
            path.unlink()
        assert backend.hold_place() == ["the journal of 1 allocations was removed"]
        # What lies in its place is kept, and not believed.
        foreign = b"not a database" * 100
        for path in world.state_dir.glob(f"{JOURNAL_NAME}*"):
            path.unlink()
        (world.state_dir / JOURNAL_NAME).write_bytes(foreign)
        assert backend.hold_place() == ["the journal of 1 allocations was removed"]
        assert foreign in [path.read_bytes() for path in world.state_dir.glob("*.aside-*")]
        assert [it.state for it in world.restart().adoptions] == [AllocationState.HANDED_OFF]
        assert world.identities(allocation_id) == before
        second = LinuxWorld(tmp_path / "other", cgroup2, image_root)
        second.state_dir = world.state_dir
        with pytest.raises(JournalBusy):
            second.launch()


# --- What no event has said --------------------------------------------------------------------


def kill_init(world: LinuxWorld, name: str) -> None:
    pid = world.init_of(name)
    world.kill_init(name)
    wait_until(lambda: not is_alive(pid))


def remove_scope(world: LinuxWorld, name: str) -> None:
    world.remove_scope(name)


def give_to_another(world: LinuxWorld, name: str) -> None:
    os.setxattr(world.scope(name), OWNER_ATTRIBUTE, b"another")


LOSSES: Final = {
    kill_init: Sighting.INIT_DIED,
    remove_scope: Sighting.CHANGED,
    give_to_another: Sighting.CHANGED,
}


def tidy_lost(world: LinuxWorld, name: str) -> None:
    world.release(name)
    if world.has_scope(name):
        world.remove_scope(name)


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-20", "END-21")
@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_what_an_allocation_has_lost_is_seen_without_an_event(
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    lose: Callable[[LinuxWorld, str], None],
) -> None:
    with real(tmp_path, cgroup2, image_root) as world:
        backend = world.program_now
        names = [f"{allocation_id}-{number}" for number in range(LOOKS_MAX + 2)]
        for name in names:
            backend.create_namespaces(NamespaceRequest(name, LIGHT))
            backend.watch(name)
        wait_until(lambda: not backend.observe())
        *_, last = names
        for kind in ("scope", "anchor"):
            backend._watch.remove((kind, last))  # type: ignore[arg-type]
        lose(world, last)
        assert backend.observe() == []
        place = PlaceWatch(backend, tmp_path / "no socket", lambda: None)
        place.look()
        assert backend.observe() == []
        place.look()  # at the others
        assert backend.observe() == [(last, LOSSES[lose])]
        assert backend.is_over(last) is (lose is not kill_init)
        assert backend.observe() == []
        for name in names:
            tidy_lost(world, name)


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-20")
@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_what_an_allocation_has_lost_is_reported_by_an_event(
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    lose: Callable[[LinuxWorld, str], None],
) -> None:
    with real(tmp_path, cgroup2, image_root) as world:
        world.backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
        world.backend.watch(allocation_id)
        wait_until(lambda: not world.program_now.observe())  # what it is at first is reported
        lose(world, allocation_id)
        is_init = lose is kill_init
        world.sees(allocation_id, Sighting.INIT_DIED if is_init else Sighting.EMPTIED)
        tidy_lost(world, allocation_id)


@pytest.mark.needs_root
def test_the_mark_of_an_end_is_no_sighting(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    with real(tmp_path, cgroup2, image_root) as world:
        world.backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
        world.backend.watch(allocation_id)
        wait_until(lambda: not world.program_now.observe())
        world.backend.record_ended(allocation_id)
        assert world.program_now.observe() == []
        world.release(allocation_id)


# --- From elsewhere ----------------------------------------------------------------------------

LOOK: Final = """
import sys
from pathlib import Path
from linux.features import Features
from linux.journal import read_journal
from linux.recovery import find_cases
view = read_journal(Path(sys.argv[1]))
root = Path(sys.argv[2]) if len(sys.argv) > 2 else None
for case in find_cases(view.entries, view.instance, root, Features.probe()):
    print(case.store.name, case.init.name, case.action.name)
"""


def seen_from_another_pid_namespace(state_dir: Path, *root: Path) -> list[str]:
    words = ("unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", LOOK)
    return sorted(run_program(*words, state_dir, *root).stdout.splitlines())


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-8", "CRASH-16")
def test_from_another_pid_namespace_everything_is_kept(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    with real(tmp_path, cgroup2, image_root) as world:
        for word in ("made", "lost", "requested"):
            world.backend.create_namespaces(NamespaceRequest(f"{allocation_id}-{word}", LIGHT))
        world.backend.close()
        with Journal(world.state_dir, boot_id()) as journal:
            entry = journal.find(f"{allocation_id}-requested")
            assert entry is not None
            journal.forget(f"{allocation_id}-lost")
            journal.forget(f"{allocation_id}-requested")
            journal.intend(replace(entry, state=AllocationState.REQUESTED, anchor=None))
        assert seen_from_another_pid_namespace(world.state_dir, cgroup2) == [
            "MADE UNSEEN KEEP",
            "NONE UNSEEN KEEP",
            "REQUESTED UNSEEN KEEP",
        ]
        world.start()


@pytest.mark.needs_root
@pytest.mark.clause("CRASH-15", "CRASH-16")
def test_without_cgroups_the_journal_alone_is_believed_where_it_was_written(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    settings = NodeSettings(None, image_root, tmp_path / "uenv")

    def program(state_dir: Path) -> LinuxBackend:
        return LinuxBackend.for_provider(settings, state_dir, clock=time.monotonic)

    first = program(tmp_path / "state")
    first.create_namespaces(NamespaceRequest(allocation_id, LIGHT))
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    with pytest.raises(JournalUnavailable, match="is a copy or was moved"):
        program(tmp_path / "copy")
    assert seen_from_another_pid_namespace(tmp_path / "state") == ["MADE UNSEEN KEEP"]
    first.close()
    second = program(tmp_path / "state")
    assert [it.state for it in second.recover().adoptions] == [AllocationState.CREATED]
    second.release_namespaces(allocation_id)
    wait_until(lambda: second.why_alive(allocation_id) is None or _retried(second, allocation_id))
    second.close()


def _retried(backend: LinuxBackend, name: str) -> bool:
    backend.release_namespaces(name)
    return backend.why_alive(name) is None
