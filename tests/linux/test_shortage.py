"""What is short is named, and whose it is: by the table, and by the Linux kernel's own refusals."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from linux import syscalls
from linux.shortage import WORDS, fault_of, words_for
from linux.syscalls import SyscallError, calling
from tests.support.programs import run_program
from tests.support.scarcity import descriptors_left

ROWS: Final = [
    ("pidfd_open(2)", errno.EMFILE, "the process that called has no descriptor left"),
    ("recvmsg(2)", errno.EMFILE, "RLIMIT_NOFILE"),
    ("mount(2)", errno.EMFILE, "no number left for a file system without a device"),
    ("fsconfig(2)", errno.EMFILE, "no number left for a file system without a device"),
    ("fsmount(2)", errno.EMFILE, "RLIMIT_NOFILE"),
    ("inotify_init1(2)", errno.EMFILE, "fs.inotify.max_user_instances or its RLIMIT_NOFILE"),
    ("open(2)", errno.ENFILE, "the node has no descriptor left: raise fs.file-max"),
    ("posix_spawn(3)", errno.EAGAIN, "pids.max"),
    ("fork(2)", errno.EAGAIN, "kernel.threads-max"),
    ("execve(2)", errno.EAGAIN, "RLIMIT_NPROC"),
    ("pthread_create(3)", errno.EAGAIN, "RLIMIT_DATA"),
    ("mkdir(2)", errno.EAGAIN, "cgroup.max.descendants"),
    ("fork(2)", errno.ENOMEM, "or the init of the PID namespace has ended"),
    ("fsopen(2)", errno.ENOMEM, "no memory left"),
    ("unshare(2)", errno.ENOSPC, "user.max_net_namespaces"),
    ("epoll_ctl(2)", errno.ENOSPC, "fs.epoll.max_user_watches"),
    ("inotify_add_watch(2)", errno.ENOSPC, "fs.inotify.max_user_watches"),
    ("move_mount(2)", errno.ENOSPC, "fs.mount-max"),
    ("mount(2)", errno.ENOSPC, "fs.mount-max"),
    ("setxattr(2)", errno.ENOSPC, "extended attributes"),
    ("write(2)", errno.ENOSPC, "no space or no inode left"),
    ("mkdir(2)", errno.ENOSPC, "no space or no inode left"),
    ("write(2)", errno.EDQUOT, "quota"),
    ("write(2)", errno.EFBIG, "RLIMIT_FSIZE"),
    ("mkdir(2)", errno.EROFS, "mounted read-only"),
    ("fsopen(2)", errno.ENODEV, "load its module"),
    ("unshare(2)", errno.EPERM, "CAP_SYS_ADMIN"),
    ("setns(2)", errno.EPERM, "CAP_SYS_CHROOT"),
    ("ioctl(2) SIOCSIFFLAGS", errno.EPERM, "CAP_NET_ADMIN"),
]


@pytest.mark.clause("DAEMON-8")
@pytest.mark.parametrize(("call", "number", "words"), ROWS)
def test_basic_words_follow_from_the_call_and_the_errno(call: str, number: int, words: str) -> None:
    assert words in words_for(call, number)
    assert str(SyscallError(call, number, "/a/path")).endswith(words_for(call, number))


def test_every_row_of_the_table_is_tried() -> None:
    tried = {words_for(call, number) for call, number, _ in ROWS}
    assert tried == {words for _, _, words in WORDS}


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EPERM, errno.EINVAL, errno.EBUSY])
def test_what_is_no_shortage_has_no_words(number: int) -> None:
    assert words_for("open(2)", number) == ""
    assert ";" not in str(SyscallError("open(2)", number, "/a/path"))


def test_words_of_the_caller_come_first() -> None:
    assert str(SyscallError("open(2)", errno.ENOSPC, "/x", "mine")).endswith("/x; mine")


# --- What the Linux kernel says ----------------------------------------------------------------


def test_no_descriptor_left_is_the_process() -> None:
    with descriptors_left(0), pytest.raises(SyscallError, match="raise its RLIMIT_NOFILE"):
        syscalls.pidfd_open(os.getpid())


@pytest.mark.needs_root
def test_full_and_read_only_file_systems_are_named(small_disk: Path) -> None:
    file = small_disk / "file"
    assert fault_of(file) == ""
    size = 1 << 20
    with pytest.raises(SyscallError, match="no space or no inode left") as full:  # noqa: SIM117
        with calling("posix_fallocate(3)", file), file.open("wb") as writing:
            os.posix_fallocate(writing.fileno(), 0, size)
    file.write_bytes(b"")
    with suppress(OSError):
        file.write_bytes(b"\0" * size)
    assert fault_of(small_disk / "not" / "there") == words_for("open(2)", errno.ENOSPC)
    assert str(file) in str(full.value)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SyscallError, match="mounted read-only"), calling("mkdir(2)"):
        (small_disk / "directory").mkdir()
    assert fault_of(file) == words_for("open(2)", errno.EROFS)


def test_file_system_that_has_no_blocks_at_all_is_not_full() -> None:
    assert fault_of(Path("/proc")) == ""


@pytest.mark.needs_root
def test_no_process_left_is_named() -> None:
    """By the limit of a user who has no other process; root has none."""
    program = """
import os
from linux.syscalls import SyscallError, calling
os.setresuid(59999, 59999, 59999)  # only now: not every user can read this tree
try:
    with calling("posix_spawn(3)"):
        os.posix_spawn("/bin/true", ["true"], {})
except SyscallError as error:
    print(error)
"""
    run = run_program("prlimit", "--nproc=0", sys.executable, "-c", program)
    assert "posix_spawn(3): EAGAIN" in run.stdout
    assert "no process left: raise RLIMIT_NPROC" in run.stdout


def test_file_that_is_too_long_is_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"0123456789")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            with pytest.raises(SyscallError, match="raise RLIMIT_FSIZE"), calling("write(2)"):
                file.write(b"0")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
