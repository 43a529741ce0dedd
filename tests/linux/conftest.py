"""Fixture `daemon`: a provider that runs as a program for one test; a module can have its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import Daemon, daemon_in


@pytest.fixture
def daemon(tmp_path: Path, image_root: Path) -> Iterator[Daemon]:
    with daemon_in(tmp_path, image_root) as daemon:
        yield daemon
