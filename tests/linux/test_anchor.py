"""An anchor is small, quiet and hard to kill, and is never mistaken for another process."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from linux.anchor import (
    ANCHOR_VARIABLE,
    Anchor,
    AnchorIdentity,
    adopt,
    boot_id,
    find_anchors,
    token_of,
)
from linux.features import OLDEST, Features
from linux.forge.client import Forge
from linux.forge.spawn import spawn_within
from linux.syscalls import SyscallError, pidfd_open
from statemachine.messages import NamespaceType
from tests.support.forging import (
    ALL,
    NET,
    PID,
    allocation,
    anchors_cgroup,
    end,
    features,
    forge,
    made,
    new_token,
    plan,
    wait_dead,
    wait_until,
)

__all__ = ["anchors_cgroup", "features", "forge"]

pytestmark = pytest.mark.needs_root

ANCHOR_PSS_KIB_MAX = 512
"""Far below the smallest Python; most of it is a C library that all anchors share."""


def identity(**changes: object) -> AnchorIdentity:
    plain = {
        "boot_id": boot_id(),
        "pid": 4711,
        "pidfs_inode": 12,
        "start_time": 99,
        "seen_from": 4,
        "namespaces": {"pid": 1, "net": 2, "mnt": 3},
    }
    return AnchorIdentity.from_json({**plain, **changes})


def test_basic_anchor_lives_until_it_is_killed(forge: Forge) -> None:
    with made(forge, plan()) as anchor:
        assert anchor.is_alive()
        anchor.kill()
        wait_dead(anchor)
        assert not anchor.is_alive()
        anchor.kill()  # of one that has gone: no failure
    with pytest.raises(ValueError, match="closed"):
        anchor.is_alive()
    assert str(anchor.pid) in repr(anchor)


def test_closing_an_anchor_lets_it_live(forge: Forge) -> None:
    with made(forge, plan()) as anchor, pidfd_open(anchor.pid) as second:
        Anchor(anchor.pid, second, anchor.token).close()
        assert anchor.is_alive()


@pytest.mark.parametrize("kinds", [ALL, (NET,), ()])
def test_anchor_is_small_and_has_nothing_of_its_makers(
    forge: Forge, kinds: tuple[NamespaceType, ...]
) -> None:
    with made(forge, plan(kinds)) as anchor:
        proc = Path(f"/proc/{anchor.pid}")
        wait_until(lambda: token_of(anchor.pid) == anchor.token)
        rollup = (proc / "smaps_rollup").read_text()
        pss = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        assert pss
        assert int(pss[1]) < ANCHOR_PSS_KIB_MAX
        assert (proc / "environ").read_bytes() == f"{ANCHOR_VARIABLE}={anchor.token}\0".encode()
        # The program's own start opens libraries and closes them again.
        wait_until(lambda: not list((proc / "fd").iterdir()))
        assert (proc / "cwd").readlink() == Path("/")
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        pid_inside = (proc / "status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1]
        assert fields[3] in (str(anchor.pid), pid_inside), "it leads a session of its own"


def test_identity_survives_the_journal(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as anchor:
        written = anchor.identity(features)
        assert AnchorIdentity.from_json(json.loads(json.dumps(written.as_json()))) == written
        assert written.pid == anchor.pid
        assert written.boot_id == boot_id()
        assert (written.pidfs_inode is not None) is features.pidfs_inodes
        assert set(written.namespaces) == {"pid", "net", "mnt"}


def test_identity_of_an_ended_anchor_is_refused(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as anchor:
        end(anchor)
        with pytest.raises(SyscallError) as caught:
            anchor.identity(features)
        assert caught.value.errno == errno.ESRCH


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("boot_id", None),
        ("pid", "4711"),
        ("pid", True),
        ("pidfs_inode", "12"),
        ("start_time", 1.5),
        ("namespaces", None),
        ("namespaces", {"pid": "x"}),
    ],
)
def test_invalid_identity_names_its_field(field: str, value: object) -> None:
    wrong = "pid" if value == {"pid": "x"} else field
    with pytest.raises(ValueError, match=f"^{wrong} of an anchor's identity|^namespaces"):
        identity(**{field: value})


def test_adopt_finds_the_same_process(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as anchor:
        adopted = adopt(anchor.identity(features), anchor.token, features)
        assert adopted is not None
        with adopted:
            assert (adopted.pid, adopted.token) == (anchor.pid, anchor.token)
            adopted.kill()
            wait_dead(anchor)


def test_adopt_after_a_kernel_upgrade_of_the_features_still_finds_it(forge: Forge) -> None:
    """Written with one set of features, read with another: neither is proof of death."""
    newest = Features.probe()
    with made(forge, plan()) as anchor:
        for written, read in ((OLDEST, newest), (newest, OLDEST)):
            adopted = adopt(anchor.identity(written), anchor.token, read)
            assert adopted is not None
            adopted.close()


def test_adopt_refuses_an_anchor_of_another_boot(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as anchor:
        before = dataclasses.replace(anchor.identity(features), boot_id="another")
        assert adopt(before, anchor.token, features) is None


def test_adopt_knows_that_an_anchor_has_ended(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as anchor:
        written = anchor.identity(features)
        end(anchor)
        assert adopt(written, anchor.token, features) is None


@pytest.mark.clause("CRASH-8")
def test_adopt_knows_a_reused_number(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as first, made(forge, plan()) as second:
        reused = dataclasses.replace(first.identity(features), pid=second.pid)
        assert adopt(reused, first.token, features) is None
        assert adopt(reused, second.token, features) is None


@pytest.mark.clause("CRASH-8")
def test_adopt_without_pidfs_knows_a_number_reused_in_the_same_tick(forge: Forge) -> None:
    """The start time alone would say yes; namespaces and token are the second opinion."""
    with made(forge, plan()) as first, made(forge, plan()) as second:
        old, new = first.identity(OLDEST), second.identity(OLDEST)
        same_tick = dataclasses.replace(old, pid=new.pid, start_time=new.start_time)
        assert adopt(same_tick, first.token, OLDEST) is None
        same_inodes = dataclasses.replace(same_tick, namespaces=new.namespaces)
        wait_until(lambda: token_of(second.pid) == second.token)
        assert adopt(same_inodes, first.token, OLDEST) is None


@pytest.mark.clause("CRASH-8")
def test_adopt_refuses_another_token(forge: Forge, features: Features) -> None:
    with made(forge, plan()) as anchor:
        wait_until(lambda: token_of(anchor.pid) == anchor.token)
        assert adopt(anchor.identity(features), new_token(), features) is None


def test_adopt_knows_that_a_thread_is_no_process(features: Features) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    assert thread.native_id
    assert adopt(identity(pid=thread.native_id), "any", features) is None
    over.set()
    thread.join()


def test_adopt_keeps_an_anchor_that_was_killed_but_cannot_end(
    forge: Forge, features: Features
) -> None:
    """A zombie that its parent outside has not waited for holds up the whole PID namespace."""
    with allocation(forge, features) as (anchor, bundle):
        written = anchor.identity(features)
        with spawn_within(["true"], bundle) as zombie:
            os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
            anchor.kill()
            kept = adopt(written, anchor.token, features)
            assert kept is not None
            with kept:
                assert kept.is_alive()
        wait_dead(anchor)


def test_every_living_anchor_is_found_in_its_cgroup(
    features: Features, anchors_cgroup: Path
) -> None:
    with Forge.start(cgroup=anchors_cgroup, features=features) as forge:
        with made(forge, plan()) as first, made(forge, plan((NET,))) as second:
            with made(forge, plan(())) as ended:
                pass
            for anchor in (first, second):
                wait_until(lambda: token_of(anchor.pid) == anchor.token)  # noqa: B023
            found = find_anchors(anchors_cgroup)
            assert {token: anchor.pid for token, anchor in found.items()} == {
                first.token: first.pid,
                second.token: second.pid,
            }
            assert ended.token not in found
            for anchor in found.values():
                anchor.close()
        assert find_anchors(anchors_cgroup) == {}


def test_another_process_with_a_token_is_no_anchor(cgroup2: Path, anchors_cgroup: Path) -> None:
    with subprocess.Popen(["sleep", "infinity"], env={ANCHOR_VARIABLE: "stolen"}) as other:
        assert find_anchors(anchors_cgroup) == {}
        other.kill()


def test_no_cgroup_has_no_anchors(cgroup2: Path) -> None:
    assert find_anchors(cgroup2 / "pact.slice" / "never-was.scope") == {}


@pytest.mark.parametrize("kinds", [ALL, (PID,), (NET,), ()])
def test_anchor_ignores_what_a_service_or_a_terminal_sends(
    forge: Forge, kinds: tuple[NamespaceType, ...]
) -> None:
    with made(forge, plan(kinds)) as anchor:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(anchor.pid, number)
        # A signal that would kill it would have done so before this one is even looked at.
        os.kill(anchor.pid, signal.SIGCONT)
        assert anchor.is_alive()
