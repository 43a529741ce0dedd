"""Every backend keeps the contract: the simulated one, and that of Linux, also on an old kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from linux.testing.contract import BackendContract, create
from linux.testing.worlds import (
    IMAGE,
    KINDS_OF_WORLD,
    NET,
    OTHER_IMAGE,
    LinuxWorld,
    World,
    world_of,
)
from tests.conftest import MakeImage
from transport.contract import Sighting

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


# --- On Linux alone, because only there it can go wrong -----------------------------------------


@pytest.fixture
def linux_world(tmp_path: Path, cgroup2: Path, two_images: Path) -> Iterator[LinuxWorld]:
    with world_of("linux", tmp_path, cgroup2, two_images) as world:
        assert isinstance(world, LinuxWorld)
        yield world


@pytest.fixture
def linux_name(linux_world: LinuxWorld, allocation_id: str) -> str:
    create(linux_world, allocation_id)
    linux_world.backend.watch(allocation_id)
    return allocation_id


def test_a_process_further_down_counts(linux_world: LinuxWorld, linux_name: str) -> None:
    below = linux_world.scope(linux_name) / "a" / "b"
    below.mkdir(parents=True)
    linux_world.adopt_process(linux_name, below)
    linux_world.sees(linux_name, Sighting.POPULATED)
    linux_world.leave(linux_name)
    linux_world.sees(linux_name, Sighting.EMPTIED)
    linux_world.release(linux_name)
    assert linux_world.leftovers() == []


def test_a_net_only_allocation_has_an_init_to_watch(
    linux_world: LinuxWorld, allocation_id: str
) -> None:
    create(linux_world, allocation_id, (NET,))
    linux_world.backend.watch(allocation_id)
    linux_world.kill_init(allocation_id)
    linux_world.sees(allocation_id, Sighting.INIT_DIED)
