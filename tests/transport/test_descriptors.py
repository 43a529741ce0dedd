"""Ownership of descriptors: closed once, never forgotten, never a stranger's."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from statemachine.errors import FdPassing
from statemachine.messages import NamespaceType
from tests.support.scarcity import descriptors_left
from transport.descriptors import (
    Descriptor,
    DescriptorBundle,
    NamespaceIdentity,
    adopt_all,
    close_all,
    verify_bundle,
)

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT

NS_GET_NSTYPE = 0xB703
KIND_OF_CLONE_FLAG = {0x20000000: PID, 0x40000000: NET, 0x00020000: MOUNT}
LINK_OF_KIND = {PID: "pid", NET: "net", MOUNT: "mnt"}


def memfd() -> Descriptor:
    return Descriptor(os.memfd_create("test"))


def bundle_of(*kinds: NamespaceType) -> DescriptorBundle:
    return DescriptorBundle(kinds, [memfd() for _ in kinds])


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def test_basic_ownership() -> None:
    fd = os.memfd_create("test")
    with Descriptor(fd) as descriptor:
        assert descriptor.fileno() == fd
        assert not descriptor.closed
    assert descriptor.closed
    assert not is_open(fd)


def test_a_closed_descriptor_has_no_number() -> None:
    descriptor = memfd()
    descriptor.close()
    for use in (descriptor.fileno, descriptor.detach, descriptor.duplicate):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_closing_twice_spares_what_has_the_number_now() -> None:
    descriptor = memfd()
    number = descriptor.fileno()
    descriptor.close()
    with memfd() as stranger:
        assert stranger.fileno() == number, "Linux hands out the lowest free number"
        descriptor.close()
        assert is_open(number)


def test_a_detached_number_is_the_callers() -> None:
    descriptor = memfd()
    fd = descriptor.detach()
    descriptor.close()
    assert descriptor.closed
    assert is_open(fd)
    os.close(fd)


def test_a_duplicate_is_the_same_file_with_a_life_of_its_own() -> None:
    with memfd() as original, original.duplicate() as copy:
        assert os.path.sameopenfile(original.fileno(), copy.fileno())
        assert not os.get_inheritable(copy.fileno())
        original.close()
        assert is_open(copy.fileno())


def test_a_number_closed_behind_its_back_is_told() -> None:
    descriptor = memfd()
    os.close(descriptor.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        descriptor.close()
    assert descriptor.closed


def test_a_dropped_descriptor_is_closed_and_told() -> None:
    dropped = [memfd()]
    fd = dropped[0].fileno()
    with pytest.warns(ResourceWarning, match=rf"never closed: Descriptor\({fd}\)"):
        dropped.clear()
    assert not is_open(fd)


def test_a_negative_number_is_no_descriptor() -> None:
    with pytest.raises(ValueError, match="-1"):
        Descriptor(-1)


def test_close_all_closes_the_rest_after_a_failure() -> None:
    first, broken, last = adopt_all(os.memfd_create("test") for _ in range(3))
    os.close(broken.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        close_all([first, broken, last])
    assert first.closed
    assert broken.closed
    assert last.closed


def test_a_descriptor_shows_what_it_is() -> None:
    with memfd() as descriptor:
        assert repr(descriptor) == f"Descriptor({descriptor.fileno()})"
    assert repr(descriptor) == "Descriptor(closed)"


@pytest.mark.clause("FD-12")
def test_a_bundle_keeps_order_and_finds_by_type() -> None:
    with bundle_of(NET, PID) as bundle:
        assert bundle.types == (NET, PID)
        assert len(bundle) == 2
        assert [kind for kind, _ in bundle] == [NET, PID]
        assert bundle.filenos() == (bundle[NET].fileno(), bundle[PID].fileno())
        with pytest.raises(KeyError, match="MOUNT"):
            bundle[MOUNT]
        assert repr(bundle).startswith("DescriptorBundle(Net: Descriptor(")
    assert bundle.closed
    bundle.close()


def test_an_empty_bundle_is_a_bundle() -> None:
    bundle = DescriptorBundle()
    assert bundle.closed
    assert len(bundle) == 0
    assert bundle.filenos() == bundle.detach() == ()
    assert not bundle.duplicate()
    bundle.close()


def test_a_bundle_of_unequal_length_closes_what_it_was_given() -> None:
    for kinds in ((), (PID,), (PID, NET, MOUNT)):
        descriptors = [memfd(), memfd()]
        with pytest.raises(ValueError, match=f"2 descriptors for {len(kinds)}"):
            DescriptorBundle(kinds, descriptors)
        assert all(descriptor.closed for descriptor in descriptors)


def test_a_bundle_gives_away_all_or_nothing() -> None:
    with bundle_of(PID, NET) as bundle:
        bundle[NET].close()
        with pytest.raises(ValueError, match="closed"):
            bundle.detach()
        assert not bundle[PID].closed
    with bundle_of(PID, NET) as bundle:
        fds = bundle.detach()
        assert bundle.closed
    assert all(is_open(fd) for fd in fds)
    for fd in fds:
        os.close(fd)


def test_a_duplicated_bundle_has_a_life_of_its_own() -> None:
    with bundle_of(MOUNT, PID) as original, original.duplicate() as copy:
        assert copy.types == original.types
        pairs = zip(original.filenos(), copy.filenos(), strict=True)
        assert all(os.path.sameopenfile(*pair) for pair in pairs)
        original.close()
        assert not copy.closed


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_bundle_is_duplicated_whole_or_not_at_all(left: int) -> None:
    with bundle_of(PID, NET, MOUNT) as bundle:
        with descriptors_left(left):
            with pytest.raises(OSError, match="Too many open files"):
                bundle.duplicate()
            # What is left is left: nothing was kept.
            adopted = [memfd() for _ in range(left)]
        close_all(adopted)
        assert not any(descriptor.closed for _, descriptor in bundle)


# Verification, with real namespaces.


@dataclass
class LinuxInspector:
    """An inspector in ten lines, so that this suite needs nothing from the `linux` package."""

    asked: list[int] = field(default_factory=list)

    def inspect(self, fd: int) -> NamespaceIdentity:
        self.asked.append(fd)
        try:
            flag = fcntl.ioctl(fd, NS_GET_NSTYPE)
        except OSError as error:
            raise FdPassing(f"no namespace: {error.strerror}") from error
        status = os.fstat(fd)
        return NamespaceIdentity(KIND_OF_CLONE_FLAG[flag], (status.st_dev, status.st_ino))

    def own(self, kind: NamespaceType) -> NamespaceIdentity | None:
        with own_namespace(kind) as descriptor:
            return self.inspect(descriptor.fileno())


def own_namespace(kind: NamespaceType) -> Descriptor:
    return Descriptor(os.open(f"/proc/self/ns/{LINK_OF_KIND[kind]}", os.O_RDONLY))


@pytest.fixture
def foreign() -> Iterator[DescriptorBundle]:
    """One namespace of each type that this process is not in."""
    command = ["unshare", "--pid", "--net", "--mount", "--fork", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"ready\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == b"ready\n"
        links = [f"/proc/{holder.pid}/ns/{name}" for name in ("pid_for_children", "net", "mnt")]
        descriptors = [Descriptor(os.open(link, os.O_RDONLY)) for link in links]
        with DescriptorBundle((PID, NET, MOUNT), descriptors) as bundle:
            yield bundle
        holder.stdin.close()


@pytest.mark.needs_root
def test_verified_is_what_was_announced(foreign: DescriptorBundle) -> None:
    inspector = LinuxInspector()
    identities = verify_bundle(foreign, inspector)
    assert [identity.kind for identity in identities] == [PID, NET, MOUNT]
    assert len(set(identities)) == 3
    assert not foreign.closed
    assert all(inspector.asked.count(fd) == 1 for fd in foreign.filenos())
    assert verify_bundle(DescriptorBundle(), inspector) == ()


@pytest.mark.clause("FD-8")
@pytest.mark.needs_root
def test_swapped_descriptors_are_told_by_position(foreign: DescriptorBundle) -> None:
    swapped = [foreign[PID].duplicate(), foreign[MOUNT].duplicate(), foreign[NET].duplicate()]
    with DescriptorBundle((PID, NET, MOUNT), swapped) as bundle:
        with pytest.raises(FdPassing) as caught:
            verify_bundle(bundle, LinuxInspector())
        assert not bundle.closed
    reason = "descriptor 2 of 3, announced as Net, is a Mount namespace"
    assert caught.value == FdPassing(reason)


@pytest.mark.clause("FD-9")
@pytest.mark.needs_root
def test_one_namespace_twice_is_told(foreign: DescriptorBundle) -> None:
    twice = [foreign[NET].duplicate(), foreign[PID].duplicate(), foreign[NET].duplicate()]
    with DescriptorBundle((NET, PID, NET), twice) as bundle, pytest.raises(FdPassing) as caught:
        verify_bundle(bundle, LinuxInspector())
    reason = "descriptor 3 of 3, announced as Net, is the same namespace as descriptor 1"
    assert caught.value == FdPassing(reason)


@pytest.mark.clause("FD-9")
@pytest.mark.parametrize("kind", NamespaceType)
def test_the_receivers_own_namespace_is_told(kind: NamespaceType) -> None:
    own = DescriptorBundle([kind], [own_namespace(kind)])
    with own, pytest.raises(FdPassing, match=r"1 of 1.*is the receiver's own namespace"):
        verify_bundle(own, LinuxInspector())


def test_what_is_no_namespace_is_told() -> None:
    with bundle_of(NET) as bundle, pytest.raises(FdPassing) as caught:
        verify_bundle(bundle, LinuxInspector())
    assert caught.value.reason == (
        "descriptor 1 of 1, announced as Net, cannot be used: "
        "no namespace: Inappropriate ioctl for device"
    )
