"""A descriptor is what it is said to be, and one of the allocation's own."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from linux import syscalls
from linux.features import OLDEST, Features
from linux.forge.client import Forge
from linux.namespaces import (
    CLONE_FLAGS,
    KINDS,
    PROC_NAMES,
    KernelInspector,
    has_dead_init,
    open_bundle,
    open_namespace,
)
from linux.syscalls import Ioctl, SyscallError
from statemachine.errors import FdPassing
from statemachine.messages import NamespaceType
from statemachine.testing.strategies import ORDERS
from tests.support.forging import (
    ALL,
    MOUNT,
    NET,
    PID,
    allocation,
    end,
    features,
    forge,
    made,
    plan,
    process_state,
    wait_until,
)
from transport.calls import hook_syscalls
from transport.descriptors import Descriptor, DescriptorBundle, verify_bundle

__all__ = ["features", "forge"]

pytestmark = pytest.mark.needs_root


def own_namespace(name: str) -> Descriptor:
    return syscalls.openat2(syscalls.AT_FDCWD, f"/proc/self/ns/{name}", os.O_RDONLY)


def order_id(kinds: tuple[NamespaceType, ...]) -> str:
    return "-".join(kind.value for kind in kinds) or "none"


def test_basic_tables_know_every_type() -> None:
    assert set(CLONE_FLAGS) == set(PROC_NAMES) == set(KINDS.values()) == set(NamespaceType)


@pytest.mark.parametrize("kinds", ORDERS, ids=order_id)
def test_bundle_is_what_was_asked_for_in_that_order(
    forge: Forge, features: Features, kinds: tuple[NamespaceType, ...]
) -> None:
    with allocation(forge, features, kinds) as (_, bundle):
        identities = verify_bundle(bundle, KernelInspector(features))
        assert bundle.types == kinds
        assert tuple(identity.kind for identity in identities) == kinds
        assert len(set(identities)) == len(kinds)
        assert not any(os.get_inheritable(fd) for fd in bundle.filenos())


def test_same_namespace_is_recognised_and_others_are_told_apart(
    forge: Forge, features: Features
) -> None:
    inspector = KernelInspector(features)
    with (
        allocation(forge, features) as (anchor, first),
        allocation(forge, features) as (_, other),
        open_bundle(anchor, tuple(reversed(ALL)), features) as again,
    ):
        identities = verify_bundle(first, inspector)
        assert verify_bundle(again, inspector) == tuple(reversed(identities))
        assert not set(identities) & set(verify_bundle(other, inspector))


def test_both_ways_open_the_same_namespace(forge: Forge) -> None:
    newest = Features.probe()
    inspector = KernelInspector(newest)
    with made(forge, plan()) as anchor:
        for kind in ALL:
            with (
                open_namespace(anchor, kind, newest) as by_pidfd,
                open_namespace(anchor, kind, OLDEST) as by_proc,
            ):
                assert inspector.inspect(by_pidfd.fileno()) == inspector.inspect(by_proc.fileno())


def test_a_path_in_proc_is_believed_only_of_an_anchor_that_lives_after_it(forge: Forge) -> None:
    """Its pid may be another process's by then."""
    with made(forge, plan((NET,))) as anchor:

        def end_when_opened(function: Any, arguments: Any, keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            if arguments[0] == "openat2(2)":
                end(anchor)
            return result

        with hook_syscalls(end_when_opened), pytest.raises(SyscallError) as refusal:
            open_namespace(anchor, NET, OLDEST)
        assert refusal.value.errno == errno.ESRCH


def test_namespace_that_was_not_made_is_the_nodes_own(forge: Forge, features: Features) -> None:
    inspector = KernelInspector(features)
    with made(forge, plan((NET,))) as anchor, open_bundle(anchor, (MOUNT,), features) as bundle:
        assert inspector.inspect(bundle[MOUNT].fileno()) == inspector.own(MOUNT)
        with pytest.raises(FdPassing, match="own namespace"):
            verify_bundle(bundle, inspector)


def test_ended_anchor_opens_nothing(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as anchor:
        end(anchor)
        for kind in ALL:
            with pytest.raises(SyscallError) as caught:
                open_bundle(anchor, (kind,), features)
            assert caught.value.errno == errno.ESRCH


def test_bundle_is_opened_whole_or_not_at_all(forge: Forge, features: Features) -> None:
    """The last type is none that exists: what was opened before it is closed (the census)."""
    with made(forge, plan()) as anchor, pytest.raises(KeyError):
        open_bundle(anchor, (PID, NET, "Mount"), features)  # type: ignore[arg-type]


def expect_known(request: Ioctl, name: str, argument: Any) -> None:
    """Skip the test if the Linux kernel does not know a request, whatever the features say."""
    with own_namespace(name) as own:
        try:
            syscalls.ioctl(own, request, argument)
        except SyscallError as error:
            if error.errno != errno.ENOTTY:
                raise
            pytest.skip(f"kernel lacks {request.name}")


def test_identity_outlives_the_namespace_where_the_kernel_says_so(forge: Forge) -> None:
    """Inodes of namespaces are used again, ids are not."""
    newest = Features.probe()
    expect_known(Ioctl.NS_GET_ID, "net", bytearray(8))
    assert newest.namespace_ids
    inspector = KernelInspector(newest)
    seen = set()
    for _ in range(20):
        with allocation(forge, newest, (NET,)) as (_, bundle):
            seen.add(inspector.inspect(bundle[NET].fileno()))
    assert len(seen) == 20


def test_mount_namespace_has_an_id_before_the_others_had() -> None:
    expect_known(Ioctl.NS_GET_MNTNS_ID, "mnt", bytearray(8))
    assert Features.probe().mount_namespace_ids
    inspector = KernelInspector(Features(mount_namespace_ids=True))
    own_mount, own_net = inspector.own(MOUNT), inspector.own(NET)
    assert own_mount is not None
    assert own_net is not None
    assert len(own_mount.key) == 1
    assert len(own_net.key) == 2


@pytest.mark.parametrize("kind", ALL)
def test_own_namespace_is_this_process(kind: NamespaceType, features: Features) -> None:
    inspector = KernelInspector(features)
    with own_namespace(PROC_NAMES[kind]) as namespace:
        assert inspector.inspect(namespace.fileno()) == inspector.own(kind)


def test_descriptor_that_is_no_namespace_is_refused(tmp_path: Path, features: Features) -> None:
    inspector = KernelInspector(features)
    answer, question = map(Descriptor, os.pipe())
    opened = [
        answer,
        question,
        syscalls.openat2(syscalls.AT_FDCWD, tmp_path, os.O_RDONLY),
        syscalls.openat2(syscalls.AT_FDCWD, "/proc/self/ns/net", os.O_PATH | os.O_NOFOLLOW),
        Descriptor(socket.socket(socket.AF_UNIX).detach()),
        Descriptor(os.memfd_create("namespace")),
        syscalls.pidfd_open(os.getpid()),
    ]
    for descriptor in opened:
        with descriptor, pytest.raises(FdPassing, match="it is no namespace: ioctl"):
            inspector.inspect(descriptor.fileno())


def test_namespace_of_another_type_is_refused(features: Features) -> None:
    with (
        own_namespace("uts") as namespace,
        pytest.raises(FdPassing, match=r"another type \(CLONE flag 0x4000000\)"),
    ):
        KernelInspector(features).inspect(namespace.fileno())


def test_an_init_that_is_not_reaped_is_dead() -> None:
    expect_known(Ioctl.NS_GET_PID_FROM_PIDNS, "pid", 1)
    can_tell = Features(pidfd_namespaces=True)
    words = ["unshare", "--pid", "--fork", "sh", "-c", "echo; exec sleep infinity"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as parent, ExitStack() as stack:
        stack.callback(parent.kill)
        assert parent.stdout is not None
        parent.stdout.readline()
        init = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text())
        path = f"/proc/{init}/ns/pid"
        namespace = stack.enter_context(syscalls.openat2(syscalls.AT_FDCWD, path, os.O_RDONLY))
        assert not has_dead_init(namespace, can_tell)
        parent.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(parent.pid) == "T")  # it reaps nothing now
        os.kill(init, signal.SIGKILL)
        wait_until(lambda: process_state(init) == "Z")
        assert has_dead_init(namespace, can_tell)


def test_dead_init_is_known_where_the_kernel_tells(forge: Forge, features: Features) -> None:
    with allocation(forge, features) as (anchor, bundle):
        assert not has_dead_init(bundle[PID], features)
        end(anchor)
        assert has_dead_init(bundle[PID], features) is features.pidfd_namespaces
        # The others are as good as ever: what they hold does not hang on the anchor.
        verify_bundle(DescriptorBundle((NET,), [bundle[NET]]), KernelInspector(features))
