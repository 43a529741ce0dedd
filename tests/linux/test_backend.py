"""`LinuxBackend` on this machine: what only Linux can do to it, and what it says then."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from linux.backend import SELF_SERVICE_SLICE, LinuxBackend, NodeSettings
from linux.cgroups import (
    OWNER_ATTRIBUTE,
    WORKLOAD_SLICE,
    Scope,
    ScopeError,
    remove_cgroup,
    remove_slices,
)
from linux.doctor import examine, repair
from linux.features import OLDEST, Features
from linux.forge.client import Forge
from linux.forge.plan import AnchorPlan
from linux.instance import instance_of, new_own_token, release_ownerless
from linux.journal import read_journal
from linux.recovery import Verdict
from linux.survey import PROCESSES_SHOWN_MAX, states_of
from linux.testing.worlds import LIGHT, LinuxWorld, loop_images, real
from statemachine.errors import CreationFailed, FdPassing
from statemachine.messages import NamespaceRequest
from statemachine.states import AllocationState
from tests.support.census import kill_all
from tests.support.forging import new_token, pids_with_token
from tests.support.scarcity import descriptors_left
from tests.support.spared import is_spared
from transport.calls import hook_syscalls
from transport.contract import Sighting
from transport.testing.peer import wait_until

pytestmark = pytest.mark.needs_root

IMAGE = "hello.sqfs"
PACKAGES = Path(__file__).resolve().parents[2]


@pytest.fixture(params=[None, OLDEST], ids=["this kernel", "oldest kernel"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path, cgroup2: Path, image_root: Path
) -> Iterator[LinuxWorld]:
    with real(tmp_path, cgroup2, image_root, request.param) as world:
        yield world


@pytest.fixture
def other_world(
    tmp_path_factory: pytest.TempPathFactory, cgroup2: Path, image_root: Path
) -> Iterator[LinuxWorld]:
    with real(tmp_path_factory.mktemp("other"), cgroup2, image_root) as world:
        yield world


def request_for(name: str, image: str | None = None) -> NamespaceRequest:
    return NamespaceRequest(name, LIGHT, image)


def create(world: LinuxWorld, name: str, image: str | None = None) -> None:
    world.backend.create_namespaces(request_for(name, image))


def refusal_of(backend: LinuxBackend, request: NamespaceRequest) -> str:
    with pytest.raises(CreationFailed) as caught:
        backend.create_namespaces(request)
    return caught.value.reason


# --- What a failing step says ------------------------------------------------------------------


@pytest.mark.clause("NODE-15")
def test_a_missing_image_is_named(world: LinuxWorld, allocation_id: str, image_root: Path) -> None:
    reason = refusal_of(world.program_now, request_for(allocation_id, "no/such.sqfs"))
    assert reason.startswith("mount the image: resolve image: openat2(2): ENOENT")
    assert f"'no/such.sqfs' below {image_root}" in reason


def test_a_taken_scope_is_named_with_its_owner(
    world: LinuxWorld, other_world: LinuxWorld, allocation_id: str
) -> None:
    create(other_world, allocation_id)
    owner = Scope(world.scope(allocation_id), "").owner()
    reason = refusal_of(world.program_now, request_for(allocation_id))
    assert reason.startswith("make the scope: mkdir(2): EEXIST")
    assert str(world.scope(allocation_id)) in reason
    assert f"owner {owner}" in reason


def test_a_missing_cgroup_root_is_named(tmp_path: Path, image_root: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ScopeError, match=r"mkdir\(2\): ENOENT .*nowhere/pact.slice"):
        LinuxBackend.for_provider(
            NodeSettings(nowhere, image_root, tmp_path), tmp_path / "state", clock=lambda: 0.0
        )


# --- Without a scope ---------------------------------------------------------------------------


def test_without_cgroups_allocations_have_no_scope(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    backend = LinuxBackend.for_self_service(
        NodeSettings(None, image_root, tmp_path), clock=lambda: 0.0
    )
    backend.create_namespaces(request_for(allocation_id))
    assert backend.scope_of(allocation_id) is None
    backend.watch(allocation_id)
    assert not backend.is_over(allocation_id)
    backend.close()


# --- Running out -------------------------------------------------------------------------------


@pytest.mark.clause("LIFE-8")
def test_running_out_of_descriptors_anywhere_leaves_nothing(
    world: LinuxWorld, allocation_id: str
) -> None:
    create(world, f"{allocation_id}-first")  # with it the forge starts
    # An anchor that has only just been started cannot be told from others yet.
    wait_until(lambda: len(world.leftovers()) == 2)
    before = world.leftovers()
    reasons: list[str] = []
    for count in range(40):
        with descriptors_left(count):
            try:
                create(world, allocation_id, IMAGE)
                break
            except CreationFailed as error:
                reasons.append(error.reason)
        world.release(allocation_id)
        assert world.leftovers() == before
    else:
        pytest.fail("40 descriptors are not enough to create an allocation")
    assert reasons
    assert all("EMFILE" in reason for reason in reasons)
    world.release(allocation_id)


def test_descriptors_that_cannot_be_opened_are_refused_whole(
    world: LinuxWorld, allocation_id: str
) -> None:
    create(world, allocation_id)
    with descriptors_left(1), pytest.raises(FdPassing, match="EMFILE"):
        world.backend.bundle_of(allocation_id)
    assert len(world.identities(allocation_id)) == len(LIGHT)


def test_a_watch_that_finds_no_descriptor_begins_later(
    world: LinuxWorld, allocation_id: str
) -> None:
    create(world, allocation_id)
    with descriptors_left(0):
        world.backend.watch(allocation_id)
        assert world.sightings(allocation_id) == [Sighting.CHANGED]
        assert not world.backend.is_over(allocation_id)
    world.join(allocation_id)
    world.sees(allocation_id, Sighting.POPULATED)
    world.leave(allocation_id)
    world.sees(allocation_id, Sighting.EMPTIED)


def test_an_end_that_cannot_be_read_is_seen_later(world: LinuxWorld, allocation_id: str) -> None:
    create(world, allocation_id)
    world.backend.watch(allocation_id)
    world.join(allocation_id)
    world.sees(allocation_id, Sighting.POPULATED)
    world.leave(allocation_id)
    wait_until(lambda: "populated 0" in (world.scope(allocation_id) / "cgroup.events").read_text())
    with descriptors_left(0):
        assert set(world.sightings(allocation_id)) <= {Sighting.CHANGED}
        assert not world.backend.is_over(allocation_id)  # as the driver asks after CHANGED
    world.sees(allocation_id, Sighting.EMPTIED)


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """Fill a small filesystem for a while."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def small_world(tmp_path: Path, cgroup2: Path, image_root: Path) -> Iterator[LinuxWorld]:
    """Its journal is on a filesystem of its own, with room for little else."""
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", state_dir], check=True)
    try:
        with real(tmp_path, cgroup2, image_root) as world:
            yield world
    finally:
        subprocess.run(["umount", state_dir], check=True)


def test_an_intent_that_cannot_be_journaled_creates_nothing(
    small_world: LinuxWorld, allocation_id: str
) -> None:
    with full(small_world.state_dir):
        reason = refusal_of(small_world.program_now, request_for(allocation_id))
        assert small_world.backend.why_alive(allocation_id) is None
    assert reason.startswith("journal the intent: ")
    assert "journal.sqlite3" in reason
    assert small_world.leftovers() == []
    create(small_world, allocation_id)


def test_a_full_journal_keeps_nothing_alive(small_world: LinuxWorld, allocation_id: str) -> None:
    create(small_world, allocation_id)
    small_world.join(allocation_id)
    with full(small_world.state_dir):
        small_world.backend.record_handed_off(allocation_id)
        small_world.backend.release_namespaces(allocation_id)
        wait_until(lambda: tells_of_the_journal(small_world, allocation_id))
        assert small_world.leftovers() == []
    small_world.release(allocation_id)
    assert small_world.restart().remembered == (allocation_id,)


def tells_of_the_journal(world: LinuxWorld, name: str) -> bool:
    """Whether the journal is all that is left to be done."""
    world.backend.release_namespaces(name)
    return (world.backend.why_alive(name) or "").startswith("remove the journal entry: ")


# --- Two providers on a node -------------------------------------------------------------------


def test_two_providers_work_side_by_side(
    world: LinuxWorld, other_world: LinuxWorld, allocation_id: str
) -> None:
    create(world, f"{allocation_id}-one", IMAGE)
    create(other_world, f"{allocation_id}-other", IMAGE)
    before = other_world.identities(f"{allocation_id}-other")
    world.release(f"{allocation_id}-one")
    assert world.restart().adoptions == ()
    assert other_world.identities(f"{allocation_id}-other") == before


@pytest.mark.clause("CRASH-7")
def test_strays_of_the_own_cgroup_are_ended(world: LinuxWorld, other_world: LinuxWorld) -> None:
    ours, theirs = new_token(), new_token()
    for token, cgroup in ((ours, world.anchors_cgroup), (theirs, other_world.anchors_cgroup)):
        with Forge(cgroup=cgroup, features=Features.probe()) as forge:
            forge.make(AnchorPlan(token, LIGHT)).close()
    world.restart()
    wait_until(lambda: not pids_with_token(ours))
    assert pids_with_token(theirs)
    other_world.restart()
    wait_until(lambda: not pids_with_token(theirs))


@pytest.mark.clause("NODE-4")
def test_a_scope_that_others_have_put_in_its_place_is_left_alone(
    world: LinuxWorld, other_world: LinuxWorld, allocation_id: str
) -> None:
    create(world, allocation_id)
    world.remove_scope(allocation_id)
    create(other_world, allocation_id)
    other_world.join(allocation_id)
    world.release(allocation_id)
    assert other_world.identities(allocation_id)
    assert "populated 1" in (other_world.scope(allocation_id) / "cgroup.events").read_text()


# --- Recovering --------------------------------------------------------------------------------


def test_why_an_ended_allocation_is_alive_is_journaled(
    world: LinuxWorld, allocation_id: str
) -> None:
    create(world, allocation_id)
    world.block_release(allocation_id)
    zombie = world._entangled[allocation_id].pid

    def names_the_zombie() -> bool:
        world.backend.release_namespaces(allocation_id)
        return f"{zombie} (child of {os.getpid()})" in (
            world.backend.why_alive(allocation_id) or ""
        )

    wait_until(names_the_zombie)
    why = world.backend.why_alive(allocation_id)
    world.backend.close()
    (entry,) = read_journal(world.state_dir).entries
    assert (entry.state, entry.why) == (AllocationState.ENDED, why)
    world.start()
    world.unblock_release(allocation_id)
    world.release(allocation_id)


def test_instances_are_told_apart_by_their_state_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert instance_of(tmp_path / "a") != instance_of(tmp_path / "b")
    assert instance_of(tmp_path / "a") == instance_of(tmp_path / "link")


# --- Self-service ------------------------------------------------------------------------------


SELF_SERVICE = """
import os, sys
from pathlib import Path
from linux.backend import LinuxBackend, NodeSettings
from linux.features import OLDEST, Features
from statemachine.messages import NamespaceRequest, NamespaceType

cgroup2, image_root, uenv_base, kernel, program = sys.argv[1:]
settings = NodeSettings(Path(cgroup2), Path(image_root), Path(uenv_base))
features = OLDEST if kernel == "oldest kernel" else Features.probe()
backend = LinuxBackend.for_self_service(settings, clock=lambda: 0.0, features=features)
exec(program)
backend.close()
"""


@contextmanager
def running(
    program: str, tmp_path: Path, image_root: Path, cgroup2: Path, kernel: str
) -> Iterator[subprocess.Popen[str]]:
    """Another process that serves itself; killed with the test."""
    arguments = [cgroup2, image_root, tmp_path / "uenv", kernel, program]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SELF_SERVICE, *arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def self_service(
    tmp_path: Path, cgroup2: Path, image_root: Path, features: Features | None = None
) -> Iterator[LinuxBackend]:
    settings = NodeSettings(cgroup2, image_root, tmp_path / "uenv")
    backend = LinuxBackend.for_self_service(settings, clock=lambda: 0.0, features=features)
    try:
        yield backend
    finally:
        backend.close()


@pytest.mark.clause("SELF-2")
@pytest.mark.parametrize("features", [None, OLDEST], ids=["this kernel", "oldest kernel"])
def test_self_service_makes_the_same_allocation(
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    features: Features | None,
) -> None:
    with self_service(tmp_path, cgroup2, image_root, features) as backend:
        backend.create_namespaces(request_for(allocation_id, IMAGE))
        with backend.bundle_of(allocation_id) as bundle:
            assert bundle.types == LIGHT
        scope = cgroup2 / WORKLOAD_SLICE / f"{allocation_id}.scope"
        assert backend.scope_of(allocation_id) == scope
    assert not scope.exists()


def test_self_service_opens_nothing_before_it_is_needed(
    tmp_path: Path, cgroup2: Path, image_root: Path
) -> None:
    with self_service(tmp_path, cgroup2, image_root) as backend:
        assert backend._forge.pid is None
        assert not (tmp_path / "uenv").exists()


def test_self_service_does_not_share_the_providers_scope(
    world: LinuxWorld, tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    create(world, allocation_id)
    with self_service(tmp_path, cgroup2, image_root) as backend:
        backend.create_namespaces(request_for(allocation_id))
        own = cgroup2 / SELF_SERVICE_SLICE / WORKLOAD_SLICE / f"{allocation_id}.scope"
        assert backend.scope_of(allocation_id) == own
        world.release(allocation_id)
        assert own.exists()
    assert not own.exists()
    assert not (cgroup2 / SELF_SERVICE_SLICE).exists()


@pytest.mark.clause("SELF-12")
@pytest.mark.parametrize("kernel", ["this kernel", "oldest kernel"])
def test_self_service_ends_with_a_consumer_that_is_killed(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str, kernel: str
) -> None:
    scope = cgroup2 / WORKLOAD_SLICE / f"{allocation_id}.scope"
    program = f"""
request = NamespaceRequest({allocation_id!r}, (NamespaceType.PID, NamespaceType.MOUNT), {IMAGE!r})
backend.create_namespaces(request)
print("made", flush=True)
sys.stdin.read()
"""
    with running(program, tmp_path, image_root, cgroup2, kernel) as child, ExitStack() as stack:
        assert child.stdout is not None
        assert child.stdout.readline() == "made\n"
        member = stack.enter_context(subprocess.Popen(["sleep", "infinity"]))
        (scope / "cgroup.procs").write_text(str(member.pid))
        child.kill()
        assert member.wait(10) == -signal.SIGKILL
    wait_until(lambda: not scope.exists())
    wait_until(lambda: not any(image.is_relative_to(image_root) for image in loop_images()))
    remove_slices(cgroup2)


MAKE_AND_WAIT = """
request = NamespaceRequest({name!r}, (NamespaceType.PID, NamespaceType.MOUNT), {image!r})
backend.create_namespaces(request)
print(backend._forge.pid, backend._find(request.allocation_id).token, flush=True)
{more}
sys.stdin.read()
"""


@dataclass
class Served:
    """A consumer that serves itself, and a process that is in its scope and in no namespace."""

    program: subprocess.Popen[str]
    forge: int
    token: str
    job: subprocess.Popen[bytes]
    own_cgroup: Path

    @property
    def anchors(self) -> list[int]:
        return pids_with_token(self.token)

    def is_whole(self) -> bool:
        return self.job.poll() is None and len(self.anchors) == 1


@contextmanager
def self_served(
    tmp_path: Path, image_root: Path, cgroup2: Path, name: str, more: str = ""
) -> Iterator[Served]:
    """Have a consumer at work in a cgroup of its own, as the step of a scheduler."""
    own_cgroup = cgroup2 / f"{name}-step"
    own_cgroup.mkdir()
    enter = f"Path({str(own_cgroup / 'cgroup.procs')!r}).write_text('0')\n"
    program = enter + MAKE_AND_WAIT.format(name=name, image=IMAGE, more=more)
    with ExitStack() as stack:
        stack.callback(wait_until, lambda: remove_cgroup(own_cgroup))
        child = stack.enter_context(
            running(program, tmp_path, image_root, cgroup2, kernel="this kernel")
        )
        assert child.stdout is not None
        forge, token = child.stdout.readline().split()
        job = stack.enter_context(subprocess.Popen(["sleep", "infinity"]))
        stack.callback(job.kill)
        (cgroup2 / WORKLOAD_SLICE / f"{name}.scope" / "cgroup.procs").write_text(str(job.pid))
        wait_until(lambda: len(pids_with_token(token)) == 1)
        yield Served(child, int(forge), token, job, own_cgroup)


def kill_consumer_first(served: Served) -> None:
    os.kill(served.forge, signal.SIGSTOP)  # so that it does nothing in between
    served.program.kill()
    os.kill(served.forge, signal.SIGKILL)


def kill_forge_first(served: Served) -> None:
    os.kill(served.forge, signal.SIGKILL)
    served.program.kill()


def kill_its_cgroup(served: Served) -> None:
    kill_all(served.own_cgroup)


def a_consumer_asks_for_it(tmp_path: Path, cgroup2: Path, image_root: Path, name: str) -> None:
    with self_service(tmp_path, cgroup2, image_root) as backend:
        backend.create_namespaces(request_for(name))
        assert backend.scope_of(name) == cgroup2 / WORKLOAD_SLICE / f"{name}.scope"


def a_provider_is_asked_for_it(tmp_path: Path, cgroup2: Path, image_root: Path, name: str) -> None:
    with real(tmp_path / "provider", cgroup2, image_root) as world:
        Scope.create(cgroup2, name, new_own_token())  # left by one that died after its start
        create(world, name)
        world.release(name)


def a_provider_starts(tmp_path: Path, cgroup2: Path, image_root: Path, name: str) -> None:
    with real(tmp_path / "provider", cgroup2, image_root) as world:
        assert not world.has_scope(name)


def an_operator_repairs(tmp_path: Path, cgroup2: Path, image_root: Path, name: str) -> None:
    features = Features.probe()
    (finding,) = (it for it in examine(tmp_path, features) if it.what == f"scope of {name}")
    assert (finding.verdict, finding.is_repairable) == (Verdict.DEAD, True)
    assert repair([finding], tmp_path, features) == [f"released scope of {name}"]


@pytest.mark.clause("SELF-14", "SELF-15")
@pytest.mark.parametrize(
    "settle",
    [a_consumer_asks_for_it, a_provider_is_asked_for_it, a_provider_starts, an_operator_repairs],
)
@pytest.mark.parametrize("kill", [kill_consumer_first, kill_forge_first, kill_its_cgroup])
def test_what_a_consumer_has_made_ends_though_its_forge_is_killed_with_it(
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    kill: Callable[[Served], None],
    settle: Callable[[Path, Path, Path, str], None],
) -> None:
    with self_served(tmp_path, image_root, cgroup2, allocation_id) as served:
        kill(served)
        # By itself: the namespaces, and with them the image.
        wait_until(lambda: served.anchors == [])
        wait_until(lambda: not any(image.is_relative_to(image_root) for image in loop_images()))
        assert is_spared(served.job)
        settle(tmp_path, cgroup2, image_root, allocation_id)
        assert served.job.wait(10) == -signal.SIGKILL
    assert not (cgroup2 / WORKLOAD_SLICE / f"{allocation_id}.scope").exists()
    remove_slices(cgroup2)


@pytest.mark.clause("SELF-15")
@pytest.mark.parametrize("more", ["", "if os.fork(): os._exit(0)"], ids=["alive", "a fork alive"])
def test_what_a_consumer_that_lives_has_made_is_touched_by_none(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str, more: str
) -> None:
    features = Features.probe()
    with self_served(tmp_path, image_root, cgroup2, allocation_id, more) as served:
        with real(tmp_path / "provider", cgroup2, image_root) as world:
            reason = refusal_of(world.program_now, request_for(allocation_id))
            assert f"it belongs to owner {served.token}" in reason
        found = {it.what: it for it in examine(tmp_path, features)}
        assert found[f"scope of {allocation_id}"].verdict is Verdict.ALIVE
        assert repair(found.values(), tmp_path, features) == []
        assert served.is_whole()
        assert served.program.stdin is not None
        served.program.stdin.close()  # its end, in good order
        assert served.job.wait(10) == -signal.SIGKILL
    wait_until(lambda: not (cgroup2 / WORKLOAD_SLICE / f"{allocation_id}.scope").exists())


@pytest.mark.clause("SELF-15")
def test_a_scope_without_an_owner_is_removed_only_if_it_was_made_here_and_is_empty(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    made, busy, anothers = (
        cgroup2 / WORKLOAD_SLICE / f"{allocation_id}-{word}.scope"
        for word in ("made", "busy", "anothers")
    )
    with real(tmp_path, cgroup2, image_root) as world:
        for path in (made, busy, anothers):
            Scope.create(cgroup2, path.name.removesuffix(".scope"), "owner")
            os.removexattr(path, OWNER_ATTRIBUTE)
        anothers.chmod(0o755)
        world.adopt_process("busy", busy)
        world.restart()
        assert [path.exists() for path in (made, busy, anothers)] == [False, True, True]
        world.leave("busy")
        world.restart()
        assert [path.exists() for path in (made, busy, anothers)] == [False, False, True]
        anothers.rmdir()


@pytest.mark.clause("SELF-14")
def test_a_scope_that_was_swept_before_it_was_locked_is_not_served_from(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    scope = cgroup2 / WORKLOAD_SLICE / f"{allocation_id}.scope"
    with self_service(tmp_path, cgroup2, image_root) as backend:

        def sweep_first(
            call: Callable[..., Any], words: tuple[Any, ...], more: Mapping[str, Any]
        ) -> Any:
            if call is fcntl.flock and words[1] & fcntl.LOCK_SH:
                with hook_syscalls(lambda call, words, more: call(*words, **more)):
                    assert release_ownerless(scope)
            return call(*words, **more)

        with hook_syscalls(sweep_first):
            reason = refusal_of(backend, request_for(allocation_id))
        assert "another program removed it" in reason
        backend.create_namespaces(request_for(allocation_id))
        assert not release_ownerless(scope)


# --- What an operator reads --------------------------------------------------------------------


def test_states_are_shown_in_words() -> None:
    with subprocess.Popen(["sleep", "infinity"]) as process:
        wait_until(lambda: "sleeping" in states_of([process.pid]))
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: states_of([process.pid]) == f"{process.pid} (stopped)")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert states_of([process.pid]) == f"{process.pid} (a zombie)"


def test_no_processes_and_many_are_shown_in_words() -> None:
    assert states_of([]) == "none that can be seen; they are exiting"
    assert states_of([os.getpid()] * (PROCESSES_SHOWN_MAX + 3)).endswith("and 3 more")


def test_a_process_with_brackets_in_its_name_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "a) Z (b"
    program.write_text("#!/bin/sh\nread x\n")
    program.chmod(0o755)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        wait_until(lambda: states_of([process.pid]) == f"{process.pid} (sleeping)")
