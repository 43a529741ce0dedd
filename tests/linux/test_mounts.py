"""An image is mounted once, for its users alone, and is gone when its hold time is over."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from linux import mounts
from linux.features import OLDEST, Features
from linux.mounts import ImageError, ImageStore, resolve_image
from linux.syscalls import Ioctl, ioctl
from linux.testing.hostile import IMAGES, BadImage, spoil
from tests.conftest import MakeImage
from transport.descriptors import Descriptor
from transport.testing.peer import DEADLINE_S, wait_until

pytestmark = pytest.mark.needs_root

HOLD_TIME_S: Final = 60.0
TEXT: Final = "hello from the image\n"


@dataclass
class Clock:
    """A clock that moves only when it is set."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=[Features.probe(), OLDEST], ids=["newest", "oldest"])
def features(request: pytest.FixtureRequest) -> Features:
    found: Features = request.param
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path, make_image: MakeImage) -> Path:
    """An image root of this test's own: no other test's loop device has its images."""
    files = {"hello.txt": TEXT, "noise": random.Random(0).randbytes(40_000).hex()}
    make_image(tmp_path / "uenv" / "a.sqfs", files)
    return tmp_path / "uenv"


@pytest.fixture
def store(root: Path, clock: Clock, features: Features) -> Iterator[ImageStore]:
    with ImageStore(root, HOLD_TIME_S, clock, features) as store:
        yield store


def loops_of(root: Path) -> list[str]:
    """The loop devices with an image below the root."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if path.read_text().startswith(f"{root}/"):
                found.append(f"/dev/{path.parent.parent.name}")
        except OSError:
            continue  # freed between the two steps
    return sorted(found)


def users_of(store: ImageStore) -> set[str]:
    return set().union(*(entry.users for entry in store._images.values()))


def mounted_by(store: ImageStore) -> list[str]:
    return [entry.name for entry in store._images.values() if entry.master is not None]


def read_in(mounted: Descriptor, name: str) -> str:
    fd = Descriptor(os.open(name, os.O_RDONLY, dir_fd=mounted.fileno()))
    with fd:
        return os.read(fd.fileno(), 4096).decode()


def superblock(mounted: Descriptor) -> int:
    return os.fstat(mounted.fileno()).st_dev


# --- one image, many users -----------------------------------------------------------------------


def test_basic(store: ImageStore, root: Path, clock: Clock) -> None:
    host_mounts = Path("/proc/self/mountinfo").read_text()
    with store.acquire("a.sqfs", "alloc-1") as mounted:
        assert read_in(mounted, "hello.txt") == TEXT
        assert Path("/proc/self/mountinfo").read_text() == host_mounts
        assert not os.get_inheritable(mounted.fileno())
        assert (mounted_by(store), users_of(store)) == (["a.sqfs"], {"alloc-1"})
        (device,) = loops_of(root)
        loop = Path("/sys/block") / Path(device).name
        assert (loop / "loop" / "autoclear").read_text() == (loop / "ro").read_text() == "1\n"
    store.release("alloc-1")
    assert store.tidy() == HOLD_TIME_S
    clock.now += HOLD_TIME_S
    assert store.tidy() is None
    assert mounted_by(store) == []
    wait_until(lambda: loops_of(root) == [])


@pytest.mark.clause("NODE-12")
def test_the_mount_is_read_only_nosuid_and_nodev(store: ImageStore) -> None:
    with store.acquire("a.sqfs", "first") as first, store.acquire("a.sqfs", "second") as second:
        for mounted in (first, second):
            flags = os.fstatvfs(mounted.fileno()).f_flag
            wanted = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
            assert flags & wanted == wanted
            with pytest.raises(OSError, match="Read-only"):
                os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=mounted.fileno())


@pytest.mark.clause("NODE-13")
def test_many_users_at_once_share_one_loop_device(store: ImageStore, root: Path) -> None:
    users = 16
    with ThreadPoolExecutor(users) as pool:
        names = [f"alloc-{number}" for number in range(users)]
        found = list(pool.map(partial(store.acquire, "a.sqfs"), names))
    try:
        assert len({superblock(mount) for mount in found}) == 1
        assert len(found) == len(users_of(store)) == users
        assert len(loops_of(root)) == len(mounted_by(store)) == 1
    finally:
        for mount in found:
            mount.close()


def test_a_user_who_acquires_twice_counts_once(store: ImageStore) -> None:
    with store.acquire("a.sqfs", "alloc"), store.acquire("a.sqfs", "alloc"):
        assert users_of(store) == {"alloc"}
    store.release("alloc")
    store.release("alloc")
    store.release("another")
    assert users_of(store) == set()


def test_two_names_of_one_file_are_one_image(store: ImageStore, root: Path) -> None:
    (root / "sub").mkdir()
    (root / "link.sqfs").symlink_to("a.sqfs")
    (root / "sub" / "up.sqfs").symlink_to("../a.sqfs")
    os.link(root / "a.sqfs", root / "hard.sqfs")
    names = ("a.sqfs", "link.sqfs", "hard.sqfs", "sub/up.sqfs", "sub/../a.sqfs")
    mounted = [store.acquire(name, name) for name in names]
    for mount in mounted:
        mount.close()
    assert len(mounted_by(store)) == len(loops_of(root)) == 1


def test_a_replaced_file_is_another_image(
    store: ImageStore, root: Path, make_image: MakeImage
) -> None:
    with store.acquire("a.sqfs", "old") as old:
        new = make_image(root / "new.sqfs", {"hello.txt": "new\n"})
        new.rename(root / "a.sqfs")
        with store.acquire("a.sqfs", "new") as mounted:
            assert read_in(mounted, "hello.txt") == "new\n"
            assert read_in(old, "hello.txt") == TEXT
            assert len(mounted_by(store)) == len(loops_of(root)) == 2


# --- hold time ---------------------------------------------------------------------------------


@pytest.mark.clause("NODE-14")
def test_the_hold_time_begins_with_the_last_user(store: ImageStore, clock: Clock) -> None:
    store.acquire("a.sqfs", "first").close()
    store.acquire("a.sqfs", "second").close()
    assert store.tidy() is None
    store.release("first")
    clock.now += 1000
    assert store.tidy() is None
    store.release("second")
    clock.now += 20
    assert store.tidy() == HOLD_TIME_S - 20
    store.release("second")
    clock.now += HOLD_TIME_S - 20 - 0.5
    assert store.tidy() == 0.5
    assert mounted_by(store) == ["a.sqfs"]
    clock.now += 0.5
    assert store.tidy() is None
    assert mounted_by(store) == []


def test_an_image_acquired_during_the_hold_time_is_the_same_one(
    store: ImageStore, root: Path, clock: Clock
) -> None:
    with store.acquire("a.sqfs", "first") as first:
        before = superblock(first), loops_of(root)
    store.release("first")
    clock.now += HOLD_TIME_S - 1
    with store.acquire("a.sqfs", "second") as second:
        assert (superblock(second), loops_of(root)) == before
        clock.now += 10
        assert store.tidy() is None
        assert mounted_by(store) == ["a.sqfs"]


@pytest.mark.clause("END-8")
def test_without_a_hold_time_the_loop_is_gone_with_the_last_user(
    root: Path, clock: Clock, features: Features
) -> None:
    with ImageStore(root, 0.0, clock, features) as store:
        store.acquire("a.sqfs", "alloc").close()
        store.release("alloc")
        assert store.tidy() is None
        wait_until(lambda: loops_of(root) == [])


def test_a_mount_that_is_kept_keeps_its_loop_device(
    store: ImageStore, root: Path, clock: Clock
) -> None:
    with store.acquire("a.sqfs", "alloc") as kept:
        before = loops_of(root)
        store.release("alloc")
        clock.now += HOLD_TIME_S
        store.tidy()
        (root / "a.sqfs").unlink()
        assert (mounted_by(store), loops_of(root)) == ([], before)
        assert read_in(kept, "hello.txt") == TEXT
    wait_until(lambda: loops_of(root) == [])


def test_closing_drops_everything_and_leaves_users_their_mounts(
    store: ImageStore, root: Path
) -> None:
    with store.acquire("a.sqfs", "alloc") as mounted:
        store.close()
        store.close()
        assert mounted_by(store) == []
        assert read_in(mounted, "hello.txt") == TEXT
        with pytest.raises(ValueError, match="closed"):
            store.acquire("a.sqfs", "late")
    wait_until(lambda: loops_of(root) == [])


# --- what is no image ----------------------------------------------------------------------------


@pytest.mark.clause("NODE-15", "ERR-2")
@pytest.mark.parametrize("bad", IMAGES.values(), ids=IMAGES)
def test_what_is_no_image_is_refused_with_its_reason(
    store: ImageStore, root: Path, bad: BadImage
) -> None:
    image, name, advice = bad
    spoil(root)
    with pytest.raises(ImageError) as refusal:
        store.acquire(image, "alloc")
    error = refusal.value
    text = str(error)
    assert text.startswith(f"{error.step}: {error.call}: {error.name} ({error.strerror})")
    assert error.call.endswith("(2)") or error.call.startswith("ioctl(2) ")
    assert name in text
    assert advice in text
    assert ascii(image) in text
    assert text.split(":")[0] in ("resolve image", "mount image", "set up loop device")
    text.encode()
    assert (users_of(store), mounted_by(store)) == (set(), [])
    wait_until(lambda: loops_of(root) == [])


@pytest.mark.clause("NODE-11")
def test_magic_links_are_not_followed_even_inside(root: Path) -> None:
    with pytest.raises(ImageError) as refusal:
        resolve_image(Path("/proc/self"), "exe")
    assert refusal.value.errno in (errno.ELOOP, errno.EXDEV)


def test_a_missing_image_root_is_named(tmp_path: Path, clock: Clock, features: Features) -> None:
    with (
        ImageStore(tmp_path / "absent", HOLD_TIME_S, clock, features) as store,
        pytest.raises(ImageError, match="absent; the image root cannot be used"),
    ):
        store.acquire("a.sqfs", "alloc")


def test_a_bad_image_harms_no_good_one(store: ImageStore, root: Path) -> None:
    spoil(root)
    with store.acquire("a.sqfs", "alloc"):
        with pytest.raises(ImageError):
            store.acquire("random.sqfs", "alloc")
        assert users_of(store) == {"alloc"}
        (root / "random.sqfs").write_bytes((root / "a.sqfs").read_bytes())
        store.acquire("random.sqfs", "alloc").close()
        assert len(mounted_by(store)) == 2


def test_a_slow_image_delays_no_other(
    store: ImageStore, root: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(root / "slow.sqfs", {"hello.txt": "slow\n"})
    is_slow, may_go_on = threading.Event(), threading.Event()
    mount = mounts._mount

    def slow_mount(image: str, device: str) -> Descriptor:
        if image == "slow.sqfs":
            is_slow.set()
            assert may_go_on.wait(DEADLINE_S)
        return mount(image, device)

    monkeypatch.setattr(mounts, "_mount", slow_mount)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.acquire, "slow.sqfs", "patient")
        assert is_slow.wait(DEADLINE_S)
        store.acquire("a.sqfs", "quick").close()
        store.release("patient")
        assert store.tidy() is None  # a call is using it, though its user has gone
        may_go_on.set()
        waiting.result().close()
    assert store.tidy() == HOLD_TIME_S


# --- loop devices --------------------------------------------------------------------------------


def test_a_free_loop_device_that_is_taken_meanwhile_is_replaced_by_another(
    store: ImageStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race is real: between the two calls of the store, the device is really taken."""
    losses = 3
    taken: list[Descriptor] = []

    def racing(fd: Descriptor, request: int, arg: int | bytearray = 0) -> int:
        answer = ioctl(fd, request, arg)
        if request == Ioctl.LOOP_CTL_GET_FREE and len(taken) < losses:
            with resolve_image(root, "a.sqfs") as file:
                loop = Descriptor(os.open(f"/dev/loop{answer}", os.O_RDONLY))
                taken.append(loop)
                ioctl(loop, Ioctl.LOOP_CONFIGURE, bytearray(mounts._loop_config(file, "rival")))
        return answer

    monkeypatch.setattr(mounts, "ioctl", racing)
    try:
        with store.acquire("a.sqfs", "alloc") as mounted:
            assert read_in(mounted, "hello.txt") == TEXT
            assert len(taken) == losses
            assert len(loops_of(root)) == losses + 1
    finally:
        for loop in taken:
            loop.close()


def test_stores_that_race_for_loop_devices_all_get_one(
    root: Path, clock: Clock, features: Features, make_image: MakeImage
) -> None:
    names = [f"{number}.sqfs" for number in range(6)]
    for name in names:
        make_image(root / name, {"name.txt": name})
    stores = [ImageStore(root, HOLD_TIME_S, clock, features) for _ in names]
    wrong: list[str] = []

    def acquire(store: ImageStore, name: str) -> None:
        for _ in range(5):
            with store.acquire(name, "alloc") as mounted:
                if read_in(mounted, "name.txt") != name:
                    wrong.append(name)
            store.release("alloc")
            clock.now += HOLD_TIME_S
            store.tidy()

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(acquire, stores, names))
    for store in stores:
        store.close()
    assert wrong == []
    wait_until(lambda: loops_of(root) == [])


# --- after a restart ---------------------------------------------------------------------------


def test_a_restarted_provider_shares_what_is_still_mounted(
    store: ImageStore, root: Path, clock: Clock, features: Features
) -> None:
    with store.acquire("a.sqfs", "alloc") as kept:  # as an allocation's namespace keeps it
        store.close()
        with ImageStore(root, HOLD_TIME_S, clock, features) as restarted:
            assert restarted.adopt("a.sqfs", "alloc")
            assert restarted.adopt("a.sqfs", "other")
            assert users_of(restarted) == {"alloc", "other"}
            with restarted.acquire("a.sqfs", "new") as mounted:
                assert superblock(mounted) == superblock(kept)
            assert len(loops_of(root)) == 1
            for user in ("alloc", "other", "new"):
                restarted.release(user)
            assert restarted.tidy() == HOLD_TIME_S


def test_nothing_is_adopted_where_nothing_is_mounted(
    store: ImageStore, root: Path, make_image: MakeImage
) -> None:
    assert not store.adopt("a.sqfs", "alloc")
    assert not store.adopt("missing.sqfs", "alloc")
    assert (users_of(store), mounted_by(store), loops_of(root)) == (set(), [], [])


def test_a_replaced_image_is_not_adopted(
    store: ImageStore, root: Path, clock: Clock, features: Features, make_image: MakeImage
) -> None:
    with store.acquire("a.sqfs", "alloc"):
        store.close()
        make_image(root / "new.sqfs", {"hello.txt": "new\n"}).rename(root / "a.sqfs")
        with ImageStore(root, HOLD_TIME_S, clock, features) as restarted:
            assert not restarted.adopt("a.sqfs", "alloc")
            with restarted.acquire("a.sqfs", "new") as mounted:
                assert read_in(mounted, "hello.txt") == "new\n"


@pytest.mark.clause("END-11")
def test_a_loop_device_of_another_program_is_not_adopted(store: ImageStore, root: Path) -> None:
    control = Descriptor(os.open("/dev/loop-control", os.O_RDWR))
    with control, resolve_image(root, "a.sqfs") as file:
        number = fcntl.ioctl(control.fileno(), Ioctl.LOOP_CTL_GET_FREE)
        with Descriptor(os.open(f"/dev/loop{number}", os.O_RDONLY)) as loop:
            config = bytearray(mounts._loop_config(file, "a.sqfs"))
            tag = config.index(mounts.LOOP_TAG)
            struct.pack_into("10s", config, tag, b"stranger:x")
            fcntl.ioctl(loop.fileno(), Ioctl.LOOP_CONFIGURE, config)
            assert not store.adopt("a.sqfs", "alloc")
            with store.acquire("a.sqfs", "alloc"):
                assert len(loops_of(root)) == 2
    assert users_of(store) == {"alloc"}
