"""Other programs that make namespaces: one whole life each, from a shell's point of view.

A container, or what comes nearest, is made and removed by the program's own commands, with the same
three namespaces where it can have them. Programs are started by posix_spawn(3), which is cheaper
than what a caller in Python would use. All run in a mount namespace of their own, in which cgroup
v2 is at /sys/fs/cgroup, because crun refuses a node that has both versions mounted, and /run is
empty, so that what they note there is gone with it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from bench.children import results_of
from bench.floor import compile_anchor
from linux import syscalls

CGROUP: Final = "/sys/fs/cgroup"
NOTED: Final = ("/run", "/dev/shm")
"""Where programs note what they have made."""


class OtherProgram(NamedTuple):
    """A program, and its commands for one life; in each `{}` is a new name."""

    name: str
    commands: tuple[tuple[str, ...], ...]

    @property
    def program(self) -> str:
        return self.commands[0][0]


class OtherProgramFailed(Exception):
    """A command of a peer ended with another status than 0; the text has its last words."""


def all_peers(folder: Path) -> list[OtherProgram]:
    """Name the peers; those of OCI have a bundle in this folder, see `make_bundle`."""
    here, bundle = str(folder), str(folder / "bundle")
    namespaces = ("--fork", "--pid", "--net", "--mount", "--mount-proc")
    separate = ("--unshare-pid", "--unshare-net", "--dev-bind", "/", "/", "--proc", "/proc")

    def oci(name: str, program: str, *options: str) -> OtherProgram:
        with_root = (program, "--root", f"{here}/{program}", *options)
        create = (*with_root, "create", "--bundle", bundle, "{}")
        return OtherProgram(name, (create, (*with_root, "delete", "--force", "{}")))

    return [
        OtherProgram("unshare", (("unshare", *namespaces, "true"),)),
        OtherProgram("ip netns", (("ip", "netns", "add", "{}"), ("ip", "netns", "delete", "{}"))),
        OtherProgram("bwrap", (("bwrap", *separate, "true"),)),
        oci("crun without cgroups", "crun", "--cgroup-manager=disabled"),
        oci("crun", "crun", "--cgroup-manager=cgroupfs"),
        oci("runc", "runc"),
        _podman(here, bundle),
    ]


def _podman(folder: str, bundle: str) -> OtherProgram:
    # Privileged, and with limits that are there already, because raising them and device rules need
    # more than root has in some containers; and without it podman would only be slower.
    state = ("--root", f"{folder}/podman", "--runroot", f"{folder}/podman-run")
    podman = ("podman", *state, "--network-config-dir", f"{folder}/podman-net")
    podman = (*podman, "--cgroup-manager=cgroupfs")
    limits = ("--pids-limit=0", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
    how = ("--detach", "--privileged", "--network=none", *limits, "--name", "{}")
    run = (*podman, "run", *how, "--rootfs", f"{bundle}/rootfs", "/anchor")
    return OtherProgram("podman", (run, (*podman, "rm", "--force", "--time=0", "{}")))


def is_installed(peer: OtherProgram) -> bool:
    return shutil.which(peer.program) is not None


def make_bundle(folder: Path) -> None:
    """
    Make the OCI bundle: a root file system with one static program.

    Raises:
        subprocess.CalledProcessError: the program cannot be compiled.
    """
    root = folder / "bundle" / "rootfs"
    for name in ("proc", "dev", "sys"):
        (root / name).mkdir(parents=True)
    compile_anchor(root / "anchor")
    config = {
        "ociVersion": "1.0.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/anchor"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "mount")],
            "cgroupsPath": f"/nsh-bench-{os.getpid()}",
        },
    }
    (root.parent / "config.json").write_text(json.dumps(config))


def lives_of(peer: OtherProgram, folder: Path, count: int) -> list[float]:
    """
    Lead whole lives, one after the other; in microseconds.

    Raises:
        OtherProgramFailed, ChildFailed: a command has failed.
    """
    return results_of(partial(_lead, peer, folder / "peers.log", count))[0]


def _lead(peer: OtherProgram, log: Path, count: int) -> list[float]:
    _separate_mounts()
    times = []
    for number in range(count):
        name = f"{os.getpid()}-{number}"
        commands = [[word.replace("{}", name) for word in words] for words in peer.commands]
        started = time.perf_counter()
        for words in commands:
            _run(words, log)
        times.append((time.perf_counter() - started) * 1e6)
    return times


def _separate_mounts() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.umount2(CGROUP, syscalls.MNT_DETACH)
    syscalls.mount("cgroup2", CGROUP, "cgroup2", 0)
    for path in NOTED:
        syscalls.mount("bench", path, "tmpfs", 0)


def _run(words: Sequence[str], log: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions)
    _, status = os.waitpid(pid, 0)
    if status:
        said = log.read_text(errors="replace").strip().splitlines()
        raise OtherProgramFailed(f"{' '.join(words[:3])}: {said[-1] if said else status}")
