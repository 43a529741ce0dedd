"""A feature is what was tried and worked; the oldest kernel has none."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from linux.features import OLDEST, Features
from tests.support.programs import run_program

PACKAGES = str(Path(__file__).parents[2])


def release() -> tuple[int, ...]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


SINCE = {
    "pidfs_inodes": (6, 9),
    "pidfd_namespaces": (6, 11),
    "mount_namespace_ids": (6, 11),
    "detached_clone": (6, 15),
    "namespace_ids": (6, 18),
    "proc_by_pidns": (6, 18),
}


def test_basic_oldest_has_none() -> None:
    assert not any(asdict(OLDEST).values())
    assert set(asdict(OLDEST)) == set(SINCE)


@pytest.mark.clause("NODE-16")
@pytest.mark.needs_root
@pytest.mark.parametrize("feature", SINCE)
def test_probe_finds_what_this_kernel_has(feature: str) -> None:
    """For root on an unpatched kernel the release decides; only here is it ever looked at."""
    assert getattr(Features.probe(), feature) is (release() >= SINCE[feature])


def test_probe_is_the_same_each_time() -> None:
    assert Features.probe() == Features.probe()


@pytest.mark.clause("NODE-16")
@pytest.mark.needs_root
def test_probe_without_capabilities_finds_less_and_raises_nothing() -> None:
    assert shutil.which("setpriv"), "setpriv is missing (Debian package util-linux)"
    program = "from linux.features import Features; print(Features.probe())"
    words = ("setpriv", "--bounding-set=-all", sys.executable, "-P", "-c", program)
    found = run_program(*words).stdout
    assert "detached_clone=False" in found
    assert "proc_by_pidns=False" in found
    assert f"pidfs_inodes={Features.probe().pidfs_inodes}" in found
