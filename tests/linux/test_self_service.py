"""The consumers with this node's defaults: they need no argument, and end what they made."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import linux
from linux.simulated import SimulatedBackend, SimulatedInspector, SimulatedNode
from statemachine.errors import SocketUnavailable
from statemachine.messages import HANDOFF_SOCKET_PATH, NamespaceRequest, NamespaceType
from tests.support.consumers import Awaiting

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT

NewConsumer = Callable[..., Any]
FORMS: Final = (linux.Consumer, partial(Awaiting, form=linux.AsyncConsumer))


@pytest.fixture(params=FORMS, ids=["blocking", "asyncio"])
def new_consumer(request: pytest.FixtureRequest) -> Iterator[NewConsumer]:
    """Makes consumers of either form; they are closed after the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(closing(request.param(*args, **options)))


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


@pytest.fixture
def scope(cgroup2: Path, allocation_id: str) -> Path:
    return cgroup2 / "workload.slice" / f"{allocation_id}.scope"


@pytest.mark.clause("SELF-2", "SELF-12")
@pytest.mark.needs_root
def test_basic_a_path_is_enough(
    new_consumer: NewConsumer, nowhere: Path, allocation_id: str, scope: Path
) -> None:
    with new_consumer(nowhere).obtain(NamespaceRequest(allocation_id, (NET, PID))) as handoff:
        assert handoff.is_degraded
        assert [identity.kind for identity in handoff.identities] == [NET, PID]
        assert scope.is_dir()
        assert handoff.end()
    assert not scope.exists()


def test_not_even_a_path_is_needed(new_consumer: NewConsumer) -> None:
    assert HANDOFF_SOCKET_PATH in repr(new_consumer())


@pytest.mark.needs_root
def test_closing_a_consumer_ends_what_it_made(
    new_consumer: NewConsumer, nowhere: Path, allocation_id: str, scope: Path
) -> None:
    consumer = new_consumer(nowhere)
    consumer.obtain(NamespaceRequest(allocation_id, (NET,))).close()
    assert scope.is_dir()
    consumer.close()
    assert not scope.exists()


@pytest.mark.needs_root
def test_a_consumer_of_one_line_lives_as_long_as_its_handoff(
    nowhere: Path, allocation_id: str, scope: Path
) -> None:
    with linux.Consumer(nowhere).obtain(NamespaceRequest(allocation_id, (NET,))) as handoff:
        gc.collect()
        assert scope.is_dir()
    del handoff
    gc.collect()
    assert not scope.exists()


@pytest.mark.needs_root
def test_a_fork_of_the_program_ends_nothing(nowhere: Path, allocation_id: str, scope: Path) -> None:
    consumer = linux.Consumer(nowhere)
    with closing(consumer), consumer.obtain(NamespaceRequest(allocation_id, (NET,))):
        pid = os.fork()
        if pid == 0:
            consumer.close()
            os._exit(0)
        assert os.waitpid(pid, 0) == (pid, 0)
        assert scope.is_dir()


@pytest.mark.needs_root
def test_a_missing_directory_for_images_is_made(
    image_root: Path, tmp_path: Path, allocation_id: str
) -> None:
    base = tmp_path / "missing" / "uenv"
    own = linux.OwnNamespaces(linux.Features.probe(), image_root, base)
    with closing(own):
        own.create_namespaces(NamespaceRequest(allocation_id, (MOUNT,), "hello.sqfs"))
        assert base.is_dir()


def test_the_defaults_can_be_replaced(new_consumer: NewConsumer, nowhere: Path) -> None:
    request = NamespaceRequest("a", (NET,))
    with pytest.raises(SocketUnavailable, match="does not exist"):
        new_consumer(nowhere, service=None).obtain(request)
    with closing(SimulatedNode()) as node, closing(SimulatedBackend(node)) as service:
        consumer = new_consumer(nowhere, SimulatedInspector(), service=service)
        with consumer.obtain(request) as handoff:
            assert set(node.allocations) == {"a"}
            assert handoff.end()
