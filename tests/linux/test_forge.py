"""An anchor is made whole, or nothing is left of it; a forge that dies is replaced."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from linux import syscalls
from linux.anchor import Anchor, find_anchors
from linux.cgroups import Scope, find_cgroup2
from linux.features import Features
from linux.forge import child as forge_child
from linux.forge import client as forge_module
from linux.forge.child import SysMounts, _mounts_below_sys
from linux.forge.client import Forge
from linux.forge.idle import IDLE_COMMAND, open_idle_program
from linux.forge.plan import AnchorPlan, ForgeError
from linux.forge.spawn import spawn_within
from linux.mounts import ImageStore
from linux.namespaces import PROC_NAMES, open_bundle
from statemachine.messages import NamespaceType
from statemachine.testing.strategies import ORDERS
from tests.support.forging import (
    ALL,
    MOUNT,
    NET,
    PID,
    allocation,
    anchors_cgroup,
    end,
    features,
    forge,
    made,
    own_links,
    pids_with_token,
    plan,
    plan_in,
    run_within,
    scope,
    tmpfs,
    wait_dead,
    wait_until,
)
from tests.support.programs import run_program
from transport.descriptors import Descriptor, DescriptorBundle
from transport.testing.peer import DEADLINE_S

__all__ = ["anchors_cgroup", "features", "forge", "scope"]

pytestmark = pytest.mark.needs_root

PACKAGES = str(Path(__file__).parents[2])

OWN_USER_NAMESPACE = ("unshare", "-Urmnpf", "--mount-proc")
"""All namespaces that a forge leaves and returns to belong to that user namespace."""

NO_MEMFD = (
    *("unshare", "-pf", "--mount-proc", "sh", "-c"),
    *('echo 2 > /proc/sys/vm/memfd_noexec && exec "$@"', "-"),
)
"""In this PID namespace; the node's setting stays as it is."""

MANY = 300
"""Processes whose ends take longer than that of a forge's program."""

UNDER_PROGRAM = """
import select, sys
from pathlib import Path
from linux.features import OLDEST, Features
from linux.forge.client import Forge
from linux.forge.plan import AnchorPlan, ForgeError
from statemachine.messages import NamespaceType

def environments():
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                yield (entry / "environ").read_bytes()
        except OSError:
            pass

with Forge.start(
    cgroup=None, features=OLDEST if sys.argv[1] == "oldest" else Features.probe()
) as forge:
    first_pid = forge.pid
    exec(sys.argv[2])
"""


@pytest.fixture
def no_memfd() -> tuple[str, ...]:
    """A wrapper in which no memfd may be executed."""
    if not Path("/proc/sys/vm/memfd_noexec").exists():
        pytest.skip("kernel lacks vm.memfd_noexec")
    return NO_MEMFD


def run_owner(features: Features, program: str, *wrapper: str) -> list[str]:
    """Run a program that has a forge, under a command that takes something away from it."""
    kernel = "newest" if features == Features.probe() else "oldest"
    done = run_program(*wrapper, sys.executable, "-P", "-c", UNDER_PROGRAM, kernel, program)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def is_visible(anchor: Anchor) -> bool:
    """Whether its exec is over, and its token can be read."""
    return pids_with_token(anchor.token) == [anchor.pid]


def links_of(pid: int | None) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("pid", "net", "mnt")}


# --- what an anchor is ------------------------------------------------------------------------


@pytest.mark.clause("NODE-6")
@pytest.mark.parametrize("kinds", ORDERS, ids=lambda kinds: "-".join(k.value for k in kinds))
def test_basic_anchor_has_the_namespaces_asked_for_and_no_others(
    forge: Forge, kinds: tuple[NamespaceType, ...]
) -> None:
    own = own_links()
    with made(forge, plan(kinds)) as anchor:
        theirs = links_of(anchor.pid)
        new = {PROC_NAMES[kind] for kind in kinds}
        assert {name for name in own if theirs[name] != own[name]} == new
        assert links_of(forge.pid) == own, "the forge has returned"


@pytest.mark.clause("NODE-8")
def test_lo_is_up_and_alone(forge: Forge, features: Features) -> None:
    with allocation(forge, features, (NET,)) as (_, bundle):
        links = run_within(bundle, "ip", "-oneline", "link").splitlines()
        assert len(links) == 1
        assert "lo:" in links[0]
        assert "UP" in links[0].partition("<")[2].partition(">")[0].split(",")
        assert run_within(bundle, "ip", "-oneline", "-4", "address").split()[3] == "127.0.0.1/8"


@pytest.mark.clause("NODE-10")
def test_proc_shows_only_the_allocation(forge: Forge, features: Features) -> None:
    with allocation(forge, features) as (_, bundle):
        shown = run_within(bundle, "sh", "-c", "echo /proc/[0-9]*; cat /proc/1/comm /proc/mounts")
        pids, comm, *mounts = shown.splitlines()
        assert len(pids.split()) == 2, "the anchor and the shell"
        assert comm == IDLE_COMMAND[0]
        assert mounts[-1].startswith("proc /proc proc rw,nosuid,nodev,noexec,")


def test_proc_stays_the_nodes_where_changing_it_would_change_the_node(
    forge: Forge, features: Features
) -> None:
    with allocation(forge, features, (PID,)) as (anchor, bundle):
        assert run_within(bundle, "cat", f"/proc/{anchor.pid}/comm") == f"{IDLE_COMMAND[0]}\n"


def mounts_of_sys(table: str) -> list[str]:
    points = [line.split()[1] for line in table.splitlines()]
    return [point for point in points if point.startswith("/sys/")]


@pytest.mark.clause("NODE-20")
@pytest.mark.parametrize("kinds", [(NET, MOUNT), ALL], ids=["without PID", "all"])
def test_sys_shows_the_allocations_network_readonly(
    forge: Forge, features: Features, kinds: tuple[NamespaceType, ...]
) -> None:
    with allocation(forge, features, kinds) as (_, bundle):
        assert run_within(bundle, "ls", "/sys/class/net").split() == ["lo"]
        mounts = run_within(bundle, "cat", "/proc/self/mounts")
        assert " /sys sysfs ro,nosuid,nodev,noexec," in mounts
        # What is mounted below it on the node is there, last and so on top.
        nodes = mounts_of_sys(Path("/proc/self/mounts").read_text())
        assert mounts_of_sys(mounts)[-len(nodes) :] == nodes
        assert run_within(bundle, "ls", str(find_cgroup2())).split() == sorted(
            run_within(DescriptorBundle(), "ls", str(find_cgroup2())).split()
        )


@pytest.mark.parametrize("kinds", [(NET,), (PID, MOUNT)], ids=["no mounts", "no network"])
def test_sys_stays_the_nodes_without_both(
    forge: Forge, features: Features, kinds: tuple[NamespaceType, ...]
) -> None:
    with allocation(forge, features, kinds) as (_, bundle):
        nodes = sorted(path.name for path in Path("/sys/class/net").iterdir())
        assert sorted(run_within(bundle, "ls", "/sys/class/net").split()) == nodes


@pytest.mark.clause("NODE-20")
def test_where_no_sysfs_may_be_mounted_that_is_said_and_the_nodes_stays(
    features: Features,
) -> None:
    """A user namespace may not mount a /sys that shows more than the one it was given."""
    program = """
import logging
logging.basicConfig(stream=sys.stdout, format="%(message)s")
for name in "one", "two":
    with forge.make(AnchorPlan(name, (NamespaceType.NET, NamespaceType.MOUNT))) as anchor:
        print("made")
        anchor.kill()
"""
    cover = 'mount -t tmpfs none /sys/kernel; exec unshare -Urmnpf --mount-proc "$@"'
    said = run_owner(features, program, "unshare", "-Urm", "sh", "-c", cover, "-")
    refusal = "/sys shows the node's network: fsmount(2): EPERM (Operation not permitted)"
    assert said == [refusal, "made", "made"]


@pytest.mark.clause("NODE-20")
def test_what_is_mounted_below_sys_later_is_there_in_the_next_anchor(features: Features) -> None:
    program = """
import os, subprocess

def is_covered():
    with forge.make(AnchorPlan("token", (NamespaceType.NET, NamespaceType.MOUNT))) as anchor:
        found = os.listdir(f"/proc/{anchor.pid}/root/sys/kernel")
        anchor.kill()
    return not found

for change in "true", "mount -t tmpfs none /sys/kernel", "umount /sys/kernel":
    subprocess.run(change.split(), check=True)
    print([is_covered() for _ in range(3)])
"""
    assert run_owner(features, program, "unshare", "--mount") == [
        "[False, False, False]",
        "[True, True, True]",
        "[False, False, False]",
    ]


def test_mounts_that_are_read_while_they_change_are_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sys_line, other_line = (
        f"41 31 0:38 / {point} rw,relatime shared:1 - sysfs x rw" for point in ("/sys", "/sys/a")
    )
    table = [sys_line]
    changes = iter([True, False, False, False, True])

    class Watch:
        def has_changed(self) -> bool:
            return next(changes)

    monkeypatch.setattr(forge_child, "mount_lines", lambda: table)
    monkeypatch.setattr(forge_child, "MountWatch", Watch)
    mounts = SysMounts()
    assert mounts.below() == []
    table = [sys_line, other_line]  # there was a change already, and none is reported
    assert mounts.below() == ["/sys/a"]
    table = []
    assert [mounts.below(), mounts.below(), mounts.below()] == [["/sys/a"], ["/sys/a"], None]


def test_the_mounts_below_sys_are_those_on_top() -> None:
    def line(point: str, fstype: str) -> str:
        return f"41 31 0:38 / {point} rw,relatime shared:1 - {fstype} x rw\n"

    table = line("/", "ext4") + line("/sys", "sysfs") + line("/system", "tmpfs")
    assert _mounts_below_sys(table.splitlines()) == []
    table += line("/sys/fs/cgroup", "tmpfs") + line("/sys/fs/cgroup/unified", "cgroup2")
    table += line("/sys/kernel/a\\040b", "debugfs") + line("/sys/kernel/a\\040b", "tmpfs")
    assert _mounts_below_sys(table.splitlines()) == ["/sys/fs/cgroup", "/sys/kernel/a b"]
    table += line("/sys", "tmpfs")
    assert _mounts_below_sys(table.splitlines()) is None
    assert _mounts_below_sys([line("/", "ext4")]) is None


@pytest.mark.clause("NODE-7")
def test_orphans_are_reaped_by_an_anchor_that_knows_nothing_of_it(
    forge: Forge, features: Features
) -> None:
    with allocation(forge, features) as (_, bundle):
        run_within(bundle, "sh", "-c", "(true & sleep 0.01 & sh -c 'true & exec true' &) &")
        wait_until(lambda: run_within(bundle, "sh", "-c", "echo /proc/[0-9]*").count("/proc/") == 2)


@pytest.mark.clause("NODE-7")
def test_init_cannot_be_killed_from_inside(forge: Forge, features: Features) -> None:
    with allocation(forge, features) as (anchor, bundle):
        for sign in ("TERM", "INT", "HUP", "SEGV", "KILL", "STOP"):
            run_within(bundle, "sh", "-c", f"kill -{sign} 1")
        assert run_within(bundle, "cat", "/proc/1/comm") == f"{IDLE_COMMAND[0]}\n"
        assert anchor.is_alive()


def test_killed_anchor_takes_its_pid_namespace_along(forge: Forge, features: Features) -> None:
    with (
        allocation(forge, features) as (anchor, bundle),
        spawn_within(["sleep", "infinity"], bundle) as child,
    ):
        anchor.kill()
        assert child.wait() == -signal.SIGKILL


# --- mounts -----------------------------------------------------------------------------------


def node_mounts() -> list[str]:
    """The node's mount table, without what other test sessions mount meanwhile."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/pytest-of-" not in line]


def test_image_is_mounted_in_the_allocation_alone(
    forge: Forge, features: Features, image_root: Path, tmp_path: Path
) -> None:
    before = node_mounts()
    base = tmp_path / "not" / "yet" / "there"
    path = f"{base}/folder/hello"
    with (
        ImageStore(image_root, 0.0, lambda: 0.0, features) as store,
        allocation(
            forge,
            features,
            image=store.acquire("hello.sqfs", "one"),
            uenv_base=str(base),
            mount_path=path,
        ) as (_, bundle),
    ):
        store.release("one")
        assert run_within(bundle, "cat", f"{path}/hello.txt") == "hello from the image\n"
        assert run_within(bundle, f"{path}/bin/marker") == "marker\n"
        for target in (path, base, f"{base}/folder"):
            refusal = run_within(bundle, "sh", "-c", f"touch {target}/x 2>&1; test ! -e {target}/x")
            assert "Read-only file system" in refusal
        table = run_within(bundle, "cat", "/proc/mounts")
        assert f" {path} squashfs ro,nosuid,nodev," in table
        assert f" {base} tmpfs ro,nosuid,nodev,noexec," in table
        assert list(base.iterdir()) == [], "the node sees an empty folder"
        assert node_mounts() == before


def test_image_is_closed_in_every_case(forge: Forge, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder can be made below this")
    paths = {"uenv_base": f"{tmp_path}/base", "mount_path": f"{tmp_path}/base/image"}
    impossible = {"uenv_base": f"{file}/base", "mount_path": f"{file}/base/image"}
    with made(forge, plan(ALL, **paths), image := tmpfs()):
        assert image.closed
    with pytest.raises(ForgeError):
        forge.make(plan(ALL, **impossible), image := tmpfs())
    assert image.closed
    with pytest.raises(ValueError, match="belong together"):
        forge.make(plan(), image := tmpfs())
    assert image.closed
    with pytest.raises(ValueError, match="belong together"):
        forge.make(plan(ALL, **paths))


@pytest.mark.parametrize("kinds", [(MOUNT,), (NET, MOUNT)], ids=["anywhere", "below /sys"])
def test_mounts_come_from_the_node_and_never_go_there(
    features: Features, tmp_path: Path, kinds: tuple[NamespaceType, ...]
) -> None:
    """In a mount namespace that shares its mounts, as every node under systemd does."""
    from_inside = tmp_path / "from-inside"
    from_inside.mkdir()

    def on_such_a_node() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SHARED)
        syscalls.mount("tmpfs", "/sys/fs/cgroup", "tmpfs", 0)
        from_node = Path("/sys/fs/cgroup/from-node") if NET in kinds else tmp_path / "from-node"
        from_node.mkdir()
        with (
            Forge.start(cgroup=None, features=features) as forge,
            allocation(forge, features, kinds) as (_, bundle),
        ):
            syscalls.mount("tmpfs", from_node, "tmpfs", 0)
            assert f" {from_node} " in run_within(bundle, "cat", "/proc/mounts")
            syscalls.umount2(from_node)
            assert f" {from_node} " not in run_within(bundle, "cat", "/proc/mounts")
            run_within(bundle, "mount", "-t", "tmpfs", "tmpfs", str(from_inside))
            assert f" {from_inside} " in run_within(bundle, "cat", "/proc/mounts")
            assert f" {from_inside} " not in Path("/proc/thread-self/mounts").read_text()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(on_such_a_node).result()


# --- when it fails ----------------------------------------------------------------------------


@pytest.mark.clause("ERR-2")
def test_failed_step_is_named_and_leaves_nothing(
    forge: Forge, features: Features, tmp_path: Path
) -> None:
    before, own = node_mounts(), own_links()
    file = tmp_path / "file"
    file.write_text("no folder can be made below this")
    wanted = plan(uenv_base=f"{file}/base", mount_path=f"{file}/base/image")
    with pytest.raises(ForgeError) as caught:
        forge.make(wanted, tmpfs())
    assert str(caught.value) == (
        f"mount the image: mkdir(2): ENOTDIR (Not a directory): {file}/base"
    )
    assert (caught.value.step, caught.value.cause.errno) == ("mount the image", errno.ENOTDIR)
    assert pids_with_token(wanted.token) == []
    assert (node_mounts(), links_of(forge.pid)) == (before, own)
    with allocation(forge, features):
        pass


def test_step_that_fails_after_the_start_kills_the_anchor(features: Features) -> None:
    """A user namespace may not mount a /proc that shows more than the one it was given."""
    program = """
try:
    with forge.make(AnchorPlan("started in vain", tuple(NamespaceType))) as anchor:
        anchor.kill()
except ForgeError as error:
    print(error)
while any(b"started in vain" in environment for environment in environments()):
    select.poll().poll(2)
with forge.make(AnchorPlan("token", (NamespaceType.PID,))) as anchor:
    anchor.kill()
    print("made")
"""
    # What the outer user namespace covers, the inner one cannot uncover.
    cover = 'mount -t tmpfs none /proc/sys; exec unshare -Urmnpf "$@"'
    found = run_owner(features, program, "unshare", "-Urm", "sh", "-c", cover, "-")
    call = "fsmount(2)" if features.proc_by_pidns else "mount(2)"
    path = "" if features.proc_by_pidns else ": /proc"
    assert found == [f"mount /proc: {call}: EPERM (Operation not permitted){path}", "made"]


@pytest.mark.clause("NODE-7")
def test_where_no_memfd_may_be_executed_an_anchor_is_a_program_of_the_node(
    features: Features, no_memfd: tuple[str, ...]
) -> None:
    program = """
with forge.make(AnchorPlan("token", (NamespaceType.PID,))) as anchor:
    select.poll().poll(50)  # its exec
    print(Path(f"/proc/{anchor.pid}/comm").read_text().strip())
    anchor.kill()
"""
    assert run_owner(features, program, *no_memfd) == ["sleep"]


def test_anchor_program_that_cannot_be_executed_is_named_and_spoils_nothing(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_memfd: tuple[str, ...]
) -> None:
    broken = tmp_path / "sleep"
    broken.write_bytes(b"\x7fELF, but not really")
    broken.chmod(0o755)
    real = shutil.which("sleep")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = f"""
import shutil
plan = AnchorPlan("token", (NamespaceType.PID,))
try:
    forge.make(plan)
except ForgeError as error:
    print(error)
# The failed child was the first of its PID namespace; the next anchor has a new one.
shutil.copy({real!r}, {str(broken)!r})
with forge.make(plan) as anchor:
    print(anchor.is_alive())
    anchor.kill()
"""
    why = f"start the anchor: posix_spawn(3): ENOEXEC (Exec format error): {broken}"
    assert run_owner(features, program, *no_memfd) == [why, "True"]


def test_smallest_program_cannot_be_changed_and_is_for_known_processors() -> None:
    assert open_idle_program("pdp11") is None
    program = open_idle_program("x86_64")
    assert program is not None
    with program:
        for change in (
            lambda fd: os.pwrite(fd, b"\0", 0),
            lambda fd: os.truncate(fd, 1_000),
            lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                change(program.fileno())


def test_smallest_program_is_made_on_a_kernel_that_knows_no_executable_memfds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memfd_create = os.memfd_create

    def older(name: str, flags: int) -> int:
        if flags & ~(os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING):
            raise OSError(errno.EINVAL, "unknown flags")
        return memfd_create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    program = open_idle_program("x86_64")
    assert program is not None
    program.close()


def test_missing_anchor_program_is_named(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ForgeError, match=r"^find the anchor's program in PATH: .* ENOENT .*sleep$"):
        Forge.start(cgroup=None, features=features)


def test_forge_that_dies_at_its_start_is_quoted(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ForgeError) as caught:
        Forge.start(cgroup=None, features=features).close()
    assert str(caught.value).startswith("start the forge: execve(2): ")
    assert str(caught.value).endswith(": ImportError: a broken installation")


def test_forge_that_dies_of_a_mistake_is_quoted(features: Features) -> None:
    with Forge.start(cgroup=None, features=features) as forge:
        with pytest.raises(ForgeError, match=r"^ask the forge: recvmsg\(2\): .*: ValueError: "):
            forge._exchange(plan(), b'{"token": "", "kinds": []}', None)
        with made(forge, plan()):
            pass


def test_forge_that_cannot_enter_its_cgroup_says_so(features: Features, tmp_path: Path) -> None:
    with pytest.raises(ForgeError) as caught:
        Forge.start(cgroup=tmp_path / "gone", features=features)
    path = tmp_path / "gone" / "cgroup.procs"
    assert str(caught.value).startswith("start the forge: write(2): ENOENT")
    assert str(caught.value).endswith(str(path))


def test_limit_on_namespaces_is_reported_as_enospc(features: Features) -> None:
    """The limit is that of a user namespace of our own: no other process meets it."""
    program = """
for name in ("net", "pid", "mnt"):
    limit = Path(f"/proc/sys/user/max_{name}_namespaces")
    limit.write_text("0")
    try:
        forge.make(AnchorPlan("token", tuple(NamespaceType)))
    except ForgeError as error:
        print(error)
    limit.write_text("9")
with forge.make(AnchorPlan("token", tuple(NamespaceType))) as anchor:
    anchor.kill()
    print("made")
"""
    *refusals, made = run_owner(features, program, *OWN_USER_NAMESPACE)
    assert (len(refusals), made) == (3, "made")
    for refusal in refusals:
        assert "create the namespaces: unshare(2): ENOSPC" in refusal
        assert "raise user.max_pid_namespaces" in refusal


STARTED_IN_VAIN = """
from linux.features import Features
from linux.forge.client import Forge
from linux.forge.plan import ForgeError
try:
    Forge.start(cgroup=None, features=Features.probe())
except ForgeError as error:
    print(error)
"""


@pytest.mark.clause("NODE-21")
def test_forge_that_could_not_return_says_so_before_it_leaves() -> None:
    """Root of a user namespace alone may leave the node's namespaces, but not enter them again."""
    done = run_program("unshare", "-Ur", sys.executable, "-P", "-c", STARTED_IN_VAIN)
    refusal = "start the forge: setns(2): EPERM (Operation not permitted): /proc/self/ns/pid"
    assert done.stdout.startswith(f"{refusal}; this process is in a user namespace and its Pid ")


def test_without_capabilities_the_refusal_is_eperm_and_the_forge_lives(features: Features) -> None:
    program = """
for _ in range(2):
    try:
        forge.make(AnchorPlan("token", tuple(NamespaceType)))
    except ForgeError as error:
        print(error, forge.pid == first_pid)
with forge.make(AnchorPlan("token", ())) as anchor:
    anchor.kill()
    print("made")
"""
    *refusals, made = run_owner(features, program, "setpriv", "--bounding-set=-all")
    assert (len(refusals), made) == (2, "made")
    for refusal in refusals:
        assert "create the namespaces: unshare(2): EPERM (Operation not permitted)" in refusal
        assert refusal.endswith(" True")


def test_trial_makes_no_anchor_and_leaves_the_forge_as_it_was(features: Features) -> None:
    program = """
forge.try_out()
print(sum(b"NSHANDOFF_ANCHOR" in text for text in environments()), forge.pid == first_pid)
with forge.make(AnchorPlan("token", tuple(NamespaceType))) as anchor:
    anchor.kill()
"""
    own_proc = ("unshare", "-pf", "--mount-proc")
    assert run_owner(features, program, *own_proc) == ["0 True"]


def test_owner_without_a_free_descriptor_gets_emfile_and_no_anchor(forge: Forge) -> None:
    with made(forge, plan()):
        pass  # it is started, and has no request
    wanted = plan()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        free = stack.enter_context(Descriptor(os.open("/dev/null", os.O_RDONLY)))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free.fileno(), limits[1]))
        free.close()
        with pytest.raises(ForgeError, match=r"^receive the anchor: recvmsg\(2\): EMFILE"):
            forge.make(wanted)
    wait_until(lambda: pids_with_token(wanted.token) == [])


# --- the forge itself -------------------------------------------------------------------------


def test_forge_holds_nothing_of_its_owners(forge: Forge) -> None:
    with made(forge, plan()):
        targets = [link.readlink() for link in Path(f"/proc/{forge.pid}/fd").iterdir()]
    kinds = sorted(re.split("[:(]", str(target))[0] for target in targets)
    # Its streams, the program of anchors, the owner's socket, the way home, the node's mounts, and
    # the anchor it gave away last, which the Linux kernel has called by two names.
    pidfd = "pidfd" if "pidfd" in kinds else "anon_inode"
    streams = ["/dev/null", "/dev/null", "/memfd", "/memfd"]
    mounts = f"/proc/{forge.pid}/mountinfo"
    assert kinds == sorted([*streams, "socket", "pid", "net", "mnt", mounts, pidfd])
    assert forge.pid
    assert os.getsid(forge.pid) == forge.pid


def test_forge_is_started_once_and_again_when_it_has_died(features: Features) -> None:
    with Forge(cgroup=None, features=features) as forge, made(forge, plan()) as first:
        before = forge.pid
        assert before
        with made(forge, plan()):
            assert forge.pid == before
        with syscalls.pidfd_open(before) as pidfd:
            killed = Anchor(before, pidfd, "the forge")
            killed.kill()
            wait_dead(killed)
        assert first.is_alive()
        with made(forge, plan()) as second, open_bundle(second, ALL, features):
            assert forge.pid not in (None, before)


def test_idle_forge_that_dies_is_replaced_unnoticed(features: Features) -> None:
    with Forge.start(cgroup=None, features=features) as forge:
        for _ in range(5):
            assert forge.pid
            os.kill(forge.pid, signal.SIGKILL)
            with made(forge, plan()):
                pass


def test_forge_that_dies_before_it_reads_is_replaced_unnoticed(features: Features) -> None:
    with Forge.start(cgroup=None, features=features) as forge, ThreadPoolExecutor(1) as pool:
        first = forge.pid
        assert first
        os.kill(first, signal.SIGSTOP)
        asking = pool.submit(forge.make, plan())
        assert forge._socket
        # Its queue holds the record now, or soon; in no case will it be read.
        os.kill(first, signal.SIGKILL)
        with asking.result() as anchor:
            end(anchor)
        assert forge.pid != first


def test_forge_that_hangs_is_given_up_and_replaced(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Forge(cgroup=None, features=features) as forge:
        monkeypatch.setattr(forge_module, "FORGE_TIMEOUT_S", 1.0)
        with made(forge, plan()):
            before = forge.pid
        assert before
        os.kill(before, signal.SIGSTOP)
        with pytest.raises(ForgeError, match=r"^ask the forge: recvmsg\(2\): ETIMEDOUT"):
            forge.make(plan())
        assert forge.pid is None
        monkeypatch.undo()
        with made(forge, plan()):
            assert forge.pid != before


def test_forge_has_longer_to_start_than_to_make_an_anchor(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Forge(cgroup=None, features=features) as forge:
        monkeypatch.setattr(forge_module, "FORGE_TIMEOUT_S", 0.001)
        forge.ensure_started()
        monkeypatch.undo()


def test_anchor_that_a_dying_forge_did_not_announce_is_killed(
    features: Features, anchors_cgroup: Path
) -> None:
    for cgroup in (anchors_cgroup, None):
        with (
            Forge.start(cgroup=cgroup, features=features) as forge,
            made(forge, plan()) as anchor,
            made(forge, plan()) as other,
        ):
            wait_until(partial(is_visible, anchor))
            forge._kill_unreported(anchor.token)
            wait_dead(anchor)
            assert other.is_alive()


def test_forge_ends_with_its_context_and_serves_no_request_afterwards(features: Features) -> None:
    with Forge(cgroup=None, features=features) as forge:
        assert forge.pid is None, "it starts with the first anchor"
        with made(forge, plan()) as anchor:
            assert forge.pid
            forge.close()
            assert forge.pid is None
            assert anchor.is_alive(), "anchors outlive an untied forge"
        with pytest.raises(ValueError, match="closed"):
            forge.make(plan())


def test_threads_may_ask_at_once(forge: Forge, features: Features) -> None:
    with ThreadPoolExecutor(4) as pool:
        anchors = list(pool.map(forge.make, [plan((NET, PID)) for _ in range(12)]))
    assert len({anchor.token for anchor in anchors}) == 12
    for anchor in anchors:
        with anchor, open_bundle(anchor, (NET, PID), features):
            assert links_of(anchor.pid) != own_links()
            end(anchor)


@pytest.mark.clause("NODE-3")
def test_anchors_are_born_in_their_cgroup(features: Features, anchors_cgroup: Path) -> None:
    with (
        Forge.start(cgroup=anchors_cgroup, features=features) as forge,
        made(forge, plan()) as anchor,
    ):
        procs = anchors_cgroup / "cgroup.procs"
        wait_until(lambda: set(procs.read_text().split()) == {str(forge.pid), str(anchor.pid)})
        wait_until(partial(is_visible, anchor))
        found = find_anchors(anchors_cgroup)
        for each in found.values():
            each.close()
        assert list(found) == [anchor.token]


# --- whose end is whose -----------------------------------------------------------------------


def test_tied_anchors_end_with_the_forges_context(features: Features, scope: Scope) -> None:
    with Forge(cgroup=None, tied=True, features=features) as forge:
        kept = forge.make(plan_in(scope))
        gone = forge.make(plan())
        end(gone)
        with made(forge, plan()):
            pass
    with kept, gone:
        assert not kept.is_alive()
        assert not scope.path.exists()


def test_tied_anchors_with_many_processes_end_with_the_forges_context(features: Features) -> None:
    with Forge(cgroup=None, tied=True, features=features) as forge:
        kept = forge.make(plan())
        # They are reaped, one after the other, before their init has ended.
        fork = f"import os, signal; all(os.fork() for _ in range({MANY})) or signal.pause()"
        command = (sys.executable, "-I", "-S", "-c", fork)
        with open_bundle(kept, ALL, features) as bundle, spawn_within(command, bundle) as child:
            assert child.wait(DEADLINE_S) == 0
    with kept:
        assert not kept.is_alive()


def test_tied_forge_leaves_a_successors_scope_alone(
    features: Features, scope: Scope, cgroup2: Path
) -> None:
    with (
        Forge(cgroup=None, tied=True, features=features) as forge,
        made(forge, plan_in(scope)),
    ):
        assert scope.remove()
        name = scope.path.name.removesuffix(".scope")
        successor = Scope.create(cgroup2, name, "another owner")
    assert successor.owner() == "another owner"
    assert successor.remove()


def test_tied_forge_leaves_a_scope_alone_that_another_owner_had_before_its_anchor_was_made(
    features: Features, scope: Scope, cgroup2: Path
) -> None:
    wanted = plan_in(scope)
    assert scope.remove()
    successor = Scope.create(cgroup2, scope.path.name.removesuffix(".scope"), "another owner")
    with Forge(cgroup=None, tied=True, features=features) as forge, made(forge, wanted):
        pass
    assert successor.owner() == "another owner"
    assert successor.remove()


# --- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"token": ""}, "token"),
        ({"token": "a\0b"}, "token"),
        ({"uenv_base": "/run/pact/uenv"}, "belong together"),
        ({"mount_path": "/run/pact/uenv/x"}, "belong together"),
        ({"uenv_base": "/u", "mount_path": "/u/x", "kinds": (PID,)}, "mount namespace"),
        ({"uenv_base": "/u", "mount_path": "/v/x"}, "not below"),
        ({"uenv_base": "/u", "mount_path": "/u"}, "not below"),
        ({"uenv_base": "/u", "mount_path": "/u/../etc"}, "not below"),
    ],
)
def test_invalid_plan_is_refused_before_anything_is_made(
    fields: dict[str, object], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        AnchorPlan(**{"token": "token", "kinds": ALL, **fields})  # type: ignore[arg-type]


def test_invalid_plan_that_is_too_long_is_refused(forge: Forge) -> None:
    with pytest.raises(ValueError, match="at most 65536 can be sent"):
        forge.make(AnchorPlan("x" * 70_000, ()))
