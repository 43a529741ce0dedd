"""Every backend keeps the contract: the simulated one, and that of Linux, also on an old kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from linux.testing.contract import BackendContract
from linux.testing.worlds import (
    IMAGE,
    KINDS_OF_WORLD,
    OTHER_IMAGE,
    World,
    world_of,
)
from tests.conftest import MakeImage

pytestmark = pytest.mark.needs_root


@pytest.fixture(scope="module")
def two_images(tmp_path_factory: pytest.TempPathFactory, make_image: MakeImage) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_image(root / IMAGE, {"hello.txt": "hello\n"})
    make_image(root / OTHER_IMAGE, {"hello.txt": "hello from the other\n"})
    return root


class TestBackend(BackendContract):
    @pytest.fixture(params=KINDS_OF_WORLD)
    def world(
        self, request: pytest.FixtureRequest, tmp_path: Path, cgroup2: Path, two_images: Path
    ) -> Iterator[World]:
        with world_of(request.param, tmp_path, cgroup2, two_images) as world:
            yield world
