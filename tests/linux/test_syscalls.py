"""Every failure says what failed; every descriptor has an owner and is close-on-exec."""

from __future__ import annotations

import copy
import errno
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from linux import syscalls
from linux.syscalls import AT_FDCWD, Ioctl, SyscallError
from transport.calls import hook_syscalls
from transport.descriptors import Descriptor


def is_close_on_exec(descriptor: Descriptor) -> bool:
    return not os.get_inheritable(descriptor.fileno())


def within_own_mounts(act: Callable[[], None]) -> None:
    """Run it in a thread with a mount namespace of its own, which ends with the thread."""

    def run() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        act()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def tmpfs() -> Descriptor:
    with syscalls.fsopen("tmpfs") as context:
        syscalls.fsconfig_string(context, "size", "64k")
        syscalls.fsconfig_create(context)
        return syscalls.fsmount(context, syscalls.MOUNT_ATTR_NODEV)


@pytest.mark.clause("ERR-8")
def test_basic_failure_names_call_errno_and_path() -> None:
    with pytest.raises(SyscallError) as caught:
        syscalls.mount(None, "/nowhere", None, syscalls.MS_BIND)
    error = caught.value
    assert str(error) == "mount(2): ENOENT (No such file or directory): /nowhere"
    assert (error.call, error.errno, error.name, error.path) == (
        "mount(2)",
        errno.ENOENT,
        "ENOENT",
        "/nowhere",
    )


def test_a_call_that_a_signal_interrupts_is_made_again() -> None:
    made = 0

    def interrupt_first(function: Any, arguments: Any, keywords: Any) -> Any:
        nonlocal made
        if arguments[0] == "inotify_init1(2)":
            made += 1
            if made == 1:
                raise SyscallError(arguments[0], errno.EINTR)
        return function(*arguments, **keywords)

    with hook_syscalls(interrupt_first), syscalls.inotify_init1() as instance:
        assert is_close_on_exec(instance)
    assert made == 2


def test_failure_without_path_ends_with_the_errno() -> None:
    with pytest.raises(SyscallError) as caught:
        syscalls.setns(0, syscalls.CLONE_NEWNET)
    assert str(caught.value) == "setns(2): EINVAL (Invalid argument)"


def test_failure_survives_a_copy() -> None:
    error = SyscallError("mount(2)", errno.EPERM, b"/image")
    assert str(copy.copy(error)) == str(error)


def test_failure_of_the_standard_library_is_raised_with_the_call() -> None:
    with (
        pytest.raises(SyscallError, match=r"^rmdir\(2\): ENOENT .*: /said$"),
        syscalls.calling("rmdir(2)", "/said"),
    ):
        Path("/nowhere").rmdir()
    with (
        pytest.raises(SyscallError, match=r"^rmdir\(2\): ENOENT .*: /nowhere$"),
        syscalls.calling("rmdir(2)"),
    ):
        Path("/nowhere").rmdir()


def test_failure_with_its_call_stays_as_it_is() -> None:
    error = SyscallError("mount(2)", errno.EPERM)
    assert SyscallError.of("other(2)", error, "/other") is error


def test_timeout_of_a_socket_is_etimedout() -> None:
    assert SyscallError.of("recvmsg(2)", TimeoutError("timed out")).errno == errno.ETIMEDOUT


@pytest.mark.parametrize("path", ["/etc\0/passwd", "\ud800"])
def test_path_that_c_would_cut_or_cannot_carry_is_refused(path: str) -> None:
    with pytest.raises(SyscallError) as caught:
        syscalls.openat2(AT_FDCWD, path, os.O_RDONLY)
    assert caught.value.errno == errno.EINVAL
    assert "\0" not in str(caught.value)


def test_errno_is_the_failing_threads_own() -> None:
    wanted = {"/nowhere": errno.ENOENT, "/proc/version/below": errno.ENOTDIR}
    found: dict[str, set[int | None]] = {path: set() for path in wanted}
    begin = threading.Barrier(len(wanted))

    def fail(path: str) -> None:
        begin.wait()
        for _ in range(500):
            with pytest.raises(SyscallError) as caught:
                syscalls.openat2(AT_FDCWD, path, os.O_RDONLY)
            found[path].add(caught.value.errno)

    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(fail, wanted))
    assert found == {path: {number} for path, number in wanted.items()}


def test_call_that_waits_lets_other_threads_run(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(syscalls.openat2, AT_FDCWD, fifo, os.O_RDONLY)
        # Were the interpreter's lock held in the call, this thread would not come to the other end.
        with syscalls.openat2(AT_FDCWD, fifo, os.O_WRONLY):
            reader.result().close()


@pytest.mark.clause("NODE-11")
def test_openat2_stays_beneath(tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("inside")
    (tmp_path / "out").symlink_to("/etc")
    with syscalls.openat2(AT_FDCWD, tmp_path, os.O_PATH | os.O_DIRECTORY) as root:
        beneath = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS
        with syscalls.openat2(root, "inside", os.O_RDONLY, resolve=beneath) as file:
            assert os.read(file.fileno(), 99) == b"inside"
            assert is_close_on_exec(file)
        for path in ("../x", "out/passwd", "/etc/passwd"):
            with pytest.raises(SyscallError) as caught:
                syscalls.openat2(root, path, os.O_RDONLY, resolve=beneath)
            assert (caught.value.errno, caught.value.path) == (errno.EXDEV, path)


def test_openat2_creates_with_the_given_mode(tmp_path: Path) -> None:
    path = tmp_path / "new"
    syscalls.openat2(AT_FDCWD, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode=0o600).close()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.needs_root
def test_detached_mount_is_attached_in_the_callers_mount_namespace_alone(tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()

    def attach() -> None:
        with tmpfs() as mounted:
            assert is_close_on_exec(mounted)
            syscalls.attach_mount(mounted, tmp_path)
        table = Path("/proc/thread-self/mountinfo").read_text()
        assert f" {tmp_path} rw,nodev" in table
        with syscalls.open_tree(AT_FDCWD, tmp_path, syscalls.OPEN_TREE_CLONE) as copied:
            assert is_close_on_exec(copied)
        syscalls.mount(
            None, tmp_path, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY
        )
        assert f" {tmp_path} ro" in Path("/proc/thread-self/mountinfo").read_text()
        syscalls.umount2(tmp_path, syscalls.UMOUNT_NOFOLLOW)
        with pytest.raises(SyscallError, match=r"^umount2\(2\): EINVAL"):
            syscalls.umount2(tmp_path)

    within_own_mounts(attach)
    ours = Path("/proc/self/mountinfo").read_text().splitlines()
    assert not [line for line in ours if str(tmp_path) in line and line not in before]


@pytest.mark.needs_root
def test_filesystem_says_in_its_log_why_it_refuses() -> None:
    with syscalls.fsopen("tmpfs") as context:
        assert is_close_on_exec(context)
        syscalls.fsconfig_flag(context, "ro")
        with pytest.raises(SyscallError, match=r"^fsconfig\(2\): EINVAL .*: nonsense=1$"):
            syscalls.fsconfig_string(context, "nonsense", "1")
        assert syscalls.read_fs_log(context) == ["tmpfs: Unknown parameter 'nonsense'"]
        assert syscalls.read_fs_log(context) == []


def test_log_that_cannot_be_read_hides_nothing(tmp_path: Path) -> None:
    with syscalls.openat2(AT_FDCWD, tmp_path, os.O_RDONLY) as no_context:
        assert syscalls.read_fs_log(no_context) == ["(log: Is a directory)"]


def test_fsopen_of_an_unknown_filesystem_names_it() -> None:
    with pytest.raises(SyscallError, match=r"^fsopen\(2\): .*: nosuchfs; "):
        syscalls.fsopen("nosuchfs")


def test_ioctl_answers_with_its_result_or_in_the_buffer() -> None:
    with syscalls.openat2(AT_FDCWD, "/proc/self/ns/net", os.O_RDONLY) as namespace:
        assert syscalls.ioctl(namespace, Ioctl.NS_GET_NSTYPE) == syscalls.CLONE_NEWNET
    answer, question = map(Descriptor, os.pipe())
    with answer, question:
        os.write(question.fileno(), b"12345")
        fionread, count = 0x541B, bytearray(4)
        assert syscalls.ioctl(answer, fionread, count) == 0
        assert int.from_bytes(count, "little") == 5
        count.extend(b"free again: nothing holds on to the buffer")


def test_failed_ioctl_names_its_request() -> None:
    answer, question = map(Descriptor, os.pipe())
    with answer, question:
        with pytest.raises(SyscallError, match=r"^ioctl\(2\) NS_GET_NSTYPE: ENOTTY"):
            syscalls.ioctl(answer, Ioctl.NS_GET_NSTYPE)
        with pytest.raises(SyscallError, match=r"^ioctl\(2\) 0x1234: ENOTTY"):
            syscalls.ioctl(answer, 0x1234)
    with pytest.raises(SyscallError, match="EBADF"):
        syscalls.ioctl(-1, Ioctl.NS_GET_NSTYPE)


def test_ioctl_descriptor_is_close_on_exec() -> None:
    ns_get_userns = 0xB701
    with (
        syscalls.openat2(AT_FDCWD, "/proc/self/ns/net", os.O_RDONLY) as namespace,
        syscalls.ioctl_descriptor(namespace, ns_get_userns) as owner,
    ):
        assert is_close_on_exec(owner)
        assert syscalls.ioctl(owner, Ioctl.NS_GET_NSTYPE) == syscalls.CLONE_NEWUSER


def test_pidfd_is_the_process_and_a_signal_reaches_it() -> None:
    with (
        subprocess.Popen(["sleep", "infinity"]) as child,
        syscalls.pidfd_open(child.pid) as pidfd,
    ):
        assert is_close_on_exec(pidfd)
        syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 5)[0]
        assert child.wait() == -signal.SIGKILL
        with pytest.raises(SyscallError, match=r"^pidfd_send_signal\(2\): ESRCH"):
            syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
    with pytest.raises(SyscallError, match=rf"^pidfd_open\(2\): ESRCH .*: pid {child.pid}$"):
        syscalls.pidfd_open(child.pid)


@pytest.mark.needs_root
def test_mount_namespace_is_entered_only_with_a_root_of_ones_own() -> None:
    def enter() -> None:
        with syscalls.openat2(AT_FDCWD, "/proc/self/ns/mnt", os.O_RDONLY) as own:
            with pytest.raises(SyscallError, match=r"^setns\(2\): EINVAL \(Invalid argument\)$"):
                syscalls.setns(own, syscalls.CLONE_NEWNS)
            syscalls.unshare(syscalls.CLONE_FS)
            syscalls.setns(own, syscalls.CLONE_NEWNS)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(enter).result()
