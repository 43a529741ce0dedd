"""What the tests of anchors, namespaces and the forge share: real anchors, and an end for each."""

from __future__ import annotations

import os
import select
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from linux import cgroups, syscalls
from linux.anchor import Anchor
from linux.cgroups import Scope
from linux.features import OLDEST, Features
from linux.forge.client import Forge
from linux.forge.plan import AnchorPlan
from linux.forge.spawn import spawn_within
from linux.namespaces import open_bundle
from statemachine.messages import NamespaceType
from transport.descriptors import Descriptor, DescriptorBundle
from transport.testing.peer import DEADLINE_S, wait_until

PID: Final = NamespaceType.PID
NET: Final = NamespaceType.NET
MOUNT: Final = NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)

KERNELS: Final = {"this kernel": Features.probe(), "oldest kernel": OLDEST}


@pytest.fixture(scope="module", params=list(KERNELS.values()), ids=list(KERNELS))
def features(request: pytest.FixtureRequest) -> Features:
    found: Features = request.param
    return found


@pytest.fixture(scope="module")
def forge(features: Features) -> Iterator[Forge]:
    """One forge for a whole file, as a provider has it; anchors are each test's own."""
    with Forge.start(cgroup=None, features=features) as forge:
        yield forge


@pytest.fixture
def anchors_cgroup(cgroup2: Path, allocation_id: str) -> Iterator[Path]:
    yield cgroups.anchor_cgroup(cgroup2, allocation_id)
    wait_until(lambda: cgroups.remove_anchor_cgroup(cgroup2, allocation_id))
    cgroups.remove_slices(cgroup2)


@pytest.fixture
def scope(cgroup2: Path, allocation_id: str) -> Iterator[Scope]:
    scope = Scope.create(cgroup2, allocation_id, "the owner")
    yield scope
    scope.kill()
    wait_until(scope.remove)
    cgroups.remove_slices(cgroup2)


def new_token() -> str:
    return uuid.uuid4().hex


def plan(kinds: Sequence[NamespaceType] = ALL, **more: str) -> AnchorPlan:
    return AnchorPlan(new_token(), tuple(kinds), **more)


def plan_in(scope: Scope, kinds: Sequence[NamespaceType] = ALL) -> AnchorPlan:
    """A plan of the allocation that a scope belongs to."""
    return AnchorPlan(str(scope.owner()), tuple(kinds), scope=str(scope.path))


@contextmanager
def made(forge: Forge, wanted: AnchorPlan, image: Descriptor | None = None) -> Iterator[Anchor]:
    """An anchor that is ended with the test, however that goes."""
    with forge.make(wanted, image) as anchor:
        try:
            yield anchor
        finally:
            end(anchor)


def end(anchor: Anchor) -> None:
    anchor.kill()
    wait_dead(anchor)


def wait_dead(anchor: Anchor) -> None:
    poll = select.poll()
    poll.register(anchor.pidfd, select.POLLIN)
    assert poll.poll(DEADLINE_S * 1000), f"{anchor} does not end"


@contextmanager
def allocation(
    forge: Forge,
    features: Features,
    kinds: Sequence[NamespaceType] = ALL,
    image: Descriptor | None = None,
    **more: str,
) -> Iterator[tuple[Anchor, DescriptorBundle]]:
    """An anchor and its namespaces."""
    with (
        made(forge, plan(kinds, **more), image) as anchor,
        open_bundle(anchor, kinds, features) as bundle,
    ):
        yield anchor, bundle


def run_within(bundle: DescriptorBundle, *command: str) -> str:
    """What a command prints in there."""
    with spawn_within(command, bundle, stdout=subprocess.PIPE) as child:
        out, _ = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0, f"{command} exits with {child.returncode}"
    return out.decode()


def own_links() -> dict[str, str]:
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net", "mnt")}


def process_state(pid: int) -> str:
    """The letter in /proc/PID/stat, "Z" for a zombie; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def pids_with_token(token: str) -> list[int]:
    """Every process with the token, wherever it is."""
    wanted = f"NSHANDOFF_ANCHOR={token}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "environ").read_bytes() == wanted:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def tmpfs() -> Descriptor:
    """A detached mount with nothing in it, for where any image would do."""
    with syscalls.fsopen("tmpfs") as context:
        syscalls.fsconfig_string(context, "size", "64k")
        syscalls.fsconfig_create(context)
        return syscalls.fsmount(context, syscalls.MOUNT_ATTR_RDONLY)
