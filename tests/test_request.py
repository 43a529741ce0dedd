"""The consumer against real sockets: whatever the provider does, one live set, in time, loudly.

Both forms, `Consumer` and `AsyncConsumer`, are held to the same through `tests/consumers.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
from consumers import FORMS, Form, Stopwatch
from liar import Liar, Line, Script, copies_of, frame_of, wait_until
from serving import Serving

from linux.backend import LinuxBackend, NodeSettings
from linux.features import Features
from linux.namespaces import KernelInspector
from linux.simulated import SimulatedBackend, SimulatedInspector, SimulatedNode, Step
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import Limits
from transport.descriptors import Descriptor, DescriptorBundle
from transport.endpoint import listen
from transport.request import AUDIT_EVENT, AsyncConsumer, Consumer, Fallback, Patience, exchange
from transport.serve import Spans

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)
ROOT: Final = Path(__file__).parents[1]

HASTY: Final = Patience(connect_s=0.05, answer_s=0.1, redial_s=0.02)
"""For providers that will not answer."""

NewConsumer: TypeAlias = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__.lower())
def new_consumer(request: pytest.FixtureRequest, path: Path) -> Iterator[NewConsumer]:
    """Makes consumers of either form; they are closed after the test."""
    form: Form = request.param
    with ExitStack() as stack:

        def new(inspector: Any = None, **options: Any) -> Any:
            made = form(path, inspector or SimulatedInspector(), **options)
            return stack.enter_context(closing(made))

        yield new


@contextmanager
def a_node(**options: Any) -> Iterator[tuple[SimulatedNode, SimulatedBackend]]:
    with closing(SimulatedNode(**options)) as node, closing(SimulatedBackend(node)) as backend:
        yield node, backend


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    """Where the provider works."""
    with closing(SimulatedNode(frozenset({"hello.sqfs"}))) as made:
        yield made


@pytest.fixture
def provider(path: Path, node: SimulatedNode) -> Iterator[Serving]:
    with closing(SimulatedBackend(node)) as backend, Serving(path, backend) as serving:
        yield serving


@pytest.fixture
def own_node() -> Iterator[SimulatedNode]:
    """Where self-service works: its namespaces are told from the provider's by their node."""
    with closing(SimulatedNode(frozenset({"hello.sqfs"}))) as made:
        yield made


@pytest.fixture
def service(own_node: SimulatedNode) -> Iterator[SimulatedBackend]:
    with closing(SimulatedBackend(own_node)) as made:
        yield made


@pytest.fixture
def wanted(allocation_id: str) -> NamespaceRequest:
    return NamespaceRequest(allocation_id, ALL)


@pytest.fixture
def lent() -> Iterator[tuple[int, ...]]:
    """Three simulated namespaces for a hand-made provider to hand over."""
    with ExitStack() as stack:
        yield tuple(
            stack.enter_context(
                Descriptor(os.memfd_create(f"nshandoff-{kind.value}-{900 + number}"))
            ).fileno()
            for number, kind in enumerate(ALL)
        )


def answer_to(request: NamespaceRequest) -> NamespaceResponse:
    return NamespaceResponse(request.allocation_id, request.namespaces)


# --- Handed over -------------------------------------------------------------------------------


def test_basic_handoff(
    new_consumer: NewConsumer, provider: Serving, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        assert handoff.response == answer_to(wanted)
        assert handoff.bundle.types == ALL
        assert [identity.kind for identity in handoff.identities] == list(ALL)
        assert not handoff.is_degraded


@pytest.mark.clause("FD-12")
@pytest.mark.parametrize("order", list(permutations(ALL)), ids=str)
def test_descriptors_come_in_the_requests_order(
    new_consumer: NewConsumer,
    provider: Serving,
    allocation_id: str,
    order: tuple[NamespaceType, ...],
) -> None:
    with new_consumer().obtain(NamespaceRequest(allocation_id, order)) as handoff:
        inspect = SimulatedInspector().inspect
        assert [inspect(fd).kind for fd in handoff.bundle.filenos()] == list(order)


def test_no_namespaces_can_be_asked_for(
    new_consumer: NewConsumer, provider: Serving, allocation_id: str
) -> None:
    with new_consumer().obtain(NamespaceRequest(allocation_id, ())) as handoff:
        assert len(handoff.bundle) == 0
        assert not handoff.is_degraded


def test_the_mount_path_is_the_providers(
    new_consumer: NewConsumer, provider: Serving, allocation_id: str
) -> None:
    request = NamespaceRequest(allocation_id, (MOUNT,), "hello.sqfs")
    with new_consumer().obtain(request) as handoff:
        assert handoff.response.uenv_mount_path == "/run/pact/uenv/hello"


def test_the_same_request_again_gets_the_same_namespaces(
    new_consumer: NewConsumer, provider: Serving, wanted: NamespaceRequest
) -> None:
    consumer = new_consumer()
    with consumer.obtain(wanted) as first, consumer.obtain(wanted) as second:
        assert first.identities == second.identities


def test_detached_descriptors_survive_the_handoff(
    new_consumer: NewConsumer, provider: Serving, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        mine = [Descriptor(fd) for fd in handoff.bundle.detach()]
        identities = handoff.identities
    with ExitStack() as stack:
        for descriptor in mine:
            stack.enter_context(descriptor)
        inspect = SimulatedInspector().inspect
        assert tuple(inspect(descriptor.fileno()) for descriptor in mine) == identities


def test_leaving_the_context_closes_the_descriptors(
    new_consumer: NewConsumer, provider: Serving, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        pass
    assert handoff.bundle.closed


def test_a_handoff_can_be_closed_twice(
    new_consumer: NewConsumer, provider: Serving, wanted: NamespaceRequest
) -> None:
    handoff = new_consumer().obtain(wanted)
    handoff.close()
    handoff.close()
    assert handoff.bundle.closed


@pytest.mark.clause("FD-5")
def test_descriptors_are_not_inherited(
    new_consumer: NewConsumer, provider: Serving, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        assert not any(os.get_inheritable(fd) for fd in handoff.bundle.filenos())


def test_the_seeds_method_keeps_the_handoff_to_be_taken(
    path: Path, provider: Serving, wanted: NamespaceRequest
) -> None:
    with closing(Consumer(path, SimulatedInspector())) as consumer:
        response = consumer.request_namespaces(wanted)
        with consumer.handoff_of(wanted.allocation_id) as handoff:
            assert handoff.response is response
        with pytest.raises(KeyError):
            consumer.handoff_of(wanted.allocation_id)


def test_a_handoff_that_is_not_taken_is_closed_with_its_consumer(
    path: Path, provider: Serving, wanted: NamespaceRequest, lent: tuple[int, ...]
) -> None:
    with closing(Consumer(path, SimulatedInspector())) as consumer:
        consumer.request_namespaces(wanted)
        first = consumer._handoffs[wanted.allocation_id]
        consumer.request_namespaces(wanted)
        assert first.bundle.closed


# --- Not to be had: self-service, in time, loudly -----------------------------------------------


@contextmanager
def _nothing_there(path: Path) -> Iterator[None]:
    yield


@contextmanager
def _no_directory(path: Path) -> Iterator[None]:
    path.parent.rename(path.parent.with_name("elsewhere"))
    yield


@contextmanager
def _bound_only(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        yield


@contextmanager
def _stale(path: Path) -> Iterator[None]:
    with _bound_only(path):
        pass
    yield


@contextmanager
def _plain_file(path: Path) -> Iterator[None]:
    path.write_text("")
    yield


@contextmanager
def _full_backlog(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        _fill(path, stack)
        yield


def _fill(path: Path, stack: ExitStack) -> None:
    while True:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return


def _liar(*scripts: Script) -> Callable[[Path], AbstractContextManager[object]]:
    return lambda path: Liar(path, *scripts)


def _say_nothing(line: Line) -> None:
    """Hear, and never answer."""


def _say(*what: NamespaceError) -> Script:
    def script(line: Line) -> None:
        line.hear()
        for message in what:
            line.say(message)

    return script


def _hang_up_unheard(line: Line) -> None:
    line.hang_up()
    line.is_over.set()


def _hang_up(line: Line) -> None:
    line.hear()
    line.hang_up()


@contextmanager
def _strict_provider(path: Path) -> Iterator[None]:
    limits = Limits(allowed_uids=frozenset({54_321}))
    with a_node() as (_, backend), Serving(path, backend, limits=limits):
        yield


@contextmanager
def _unready_provider(path: Path) -> Iterator[None]:
    spans = Spans(readiness_s=0.01)
    is_over = threading.Event()

    class Recovering(SimulatedBackend):
        def recover(self) -> Any:
            is_over.wait(10)
            return super().recover()

    with (
        closing(SimulatedNode()) as node,
        closing(Recovering(node)) as backend,
        Serving(path, backend, spans=spans, waits_ready=False),
    ):
        yield
        is_over.set()


UNREACHABLE: Final[dict[str, tuple[Callable[[Path], AbstractContextManager[object]], str]]] = {
    "absent": (_nothing_there, "does not exist"),
    "no directory": (_no_directory, "does not exist"),
    "bound, not listening": (_bound_only, "no process listens"),
    "stale socket": (_stale, "no process listens"),
    "plain file": (_plain_file, "no process listens"),
    "backlog full": (_full_backlog, "backlog is full"),
    "silent": (_liar(_say_nothing), "no whole answer within the answer deadline"),
    "hangs up unheard": (_liar(_hang_up_unheard), "the"),
    "hangs up": (_liar(_hang_up), "the peer closed the connection"),
    "unavailable": (_liar(_say(SocketUnavailable("not today"))), "not today"),
    "passing failed": (_liar(_say(FdPassing("torn"))), "torn"),
    "user not allowed": (_strict_provider, "user 0 may not use this provider"),
    "not ready": (_unready_provider, "did not become ready in time"),
}

unreachable = pytest.mark.parametrize(
    ("situation", "reason"), UNREACHABLE.values(), ids=UNREACHABLE.keys()
)


@pytest.mark.clause("SELF-1", "ERR-6")
@pytest.mark.needs_root
@unreachable
def test_without_a_provider_the_consumer_serves_itself(
    new_consumer: NewConsumer,
    path: Path,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    situation: Callable[[Path], AbstractContextManager[object]],
    reason: str,
) -> None:
    with situation(path), new_consumer(service=service, patience=HASTY).obtain(wanted) as handoff:
        assert handoff.is_degraded
        assert reason in handoff.fallback.text
        assert handoff.response == answer_to(wanted)
        with service.bundle_of(wanted.allocation_id) as own:
            inspect = SimulatedInspector().inspect
            assert handoff.identities == tuple(inspect(fd) for fd in own.filenos())
        handoff.end()


@pytest.mark.clause("SELF-4")
@pytest.mark.needs_root
@unreachable
def test_the_fallback_is_loud_and_said_once(
    new_consumer: NewConsumer,
    path: Path,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    caplog: pytest.LogCaptureFixture,
    situation: Callable[[Path], AbstractContextManager[object]],
    reason: str,
) -> None:
    audited: list[Fallback] = []
    consumer = new_consumer(service=service, patience=HASTY, audit=audited.append)
    with situation(path), consumer.obtain(wanted) as handoff:
        handoff.end()
        assert audited == [Fallback(wanted.allocation_id, handoff.fallback, AUDIT_EVENT)]
        warnings = [r for r in caplog.records if r.name == exchange.__name__]
        assert [r.levelno for r in warnings] == [logging.WARNING]
        assert "namespace.handoff_failed" in warnings[0].getMessage()
        assert reason in warnings[0].getMessage()


@pytest.mark.clause("SELF-6")
@pytest.mark.needs_root
@unreachable
def test_without_self_service_the_original_error_is_raised(
    new_consumer: NewConsumer,
    path: Path,
    wanted: NamespaceRequest,
    situation: Callable[[Path], AbstractContextManager[object]],
    reason: str,
) -> None:
    with situation(path), pytest.raises((SocketUnavailable, FdPassing), match=reason):
        new_consumer(patience=HASTY).obtain(wanted)


@pytest.mark.clause("SELF-1")
@pytest.mark.needs_root
@unreachable
def test_the_consumer_waits_no_longer_than_its_patience(
    new_consumer: NewConsumer,
    path: Path,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    situation: Callable[[Path], AbstractContextManager[object]],
    reason: str,
) -> None:
    consumer = new_consumer(service=service, patience=HASTY)
    with situation(path), Stopwatch() as watch:
        handoff = consumer.obtain(wanted)
    handoff.close()
    # Far below the default deadlines, with room for a machine that has other things to do.
    assert watch.seconds < 0.9


@pytest.mark.clause("ERR-6")
def test_an_answer_cut_off_at_any_byte_is_no_answer(
    new_consumer: NewConsumer,
    path: Path,
    wanted: NamespaceRequest,
    lent: tuple[int, ...],
) -> None:
    frame = frame_of(answer_to(wanted))
    cuts = iter(range(len(frame)))

    def cut_off(line: Line) -> None:
        if isinstance(line.hear(), AllocationEnded):
            line.say(AllocationEnded(wanted.allocation_id))
            return
        cut = next(cuts)
        if cut:
            line.say(frame[:cut], lent)
        line.hang_up()
        line.is_over.set()

    consumer = new_consumer(patience=Patience(redial_s=0.01))
    with Liar(path, *[cut_off] * (2 * len(frame))):
        for cut in range(len(frame)):
            place = "in the middle of a frame" if cut else "the connection"
            with pytest.raises(SocketUnavailable, match=f"the peer closed {place}"):
                consumer.obtain(wanted)
            assert copies_of(lent) == len(lent)


def test_a_user_who_may_not_connect_is_told_so(path: Path, wanted: NamespaceRequest) -> None:
    script = """
import os, sys
from linux.simulated import SimulatedInspector
from statemachine.errors import SocketUnavailable
from statemachine.messages import NamespaceRequest
from transport.request import Consumer
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    Consumer(sys.argv[1], SimulatedInspector()).obtain(NamespaceRequest("a", ()))
except SocketUnavailable as error:
    print(error)
"""
    if os.geteuid() != 0:
        script = script.replace("os.setresuid", "# ").replace("os.setgroups", "# ")
    with tempfile.TemporaryDirectory(prefix="nsh-") as directory:
        Path(directory).chmod(0o755)
        with listen(Path(directory) / "s"):
            result = subprocess.run(
                [sys.executable, "-c", script, f"{directory}/s"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
            )
    assert "Permission denied" in result.stdout, result.stderr


@pytest.mark.clause("SELF-3")
def test_only_this_allocation_is_self_served(
    new_consumer: NewConsumer,
    path: Path,
    node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
) -> None:
    consumer = new_consumer(service=service)
    other = NamespaceRequest(f"{wanted.allocation_id}-other", ALL)
    with consumer.obtain(wanted) as degraded, closing(SimulatedBackend(node)) as backend:
        with Serving(path, backend), consumer.obtain(other) as handoff:
            assert degraded.is_degraded
            assert not handoff.is_degraded
        degraded.end()


def test_a_full_backlog_that_empties_in_time_is_waited_for(
    new_consumer: NewConsumer, path: Path, node: SimulatedNode, wanted: NamespaceRequest
) -> None:
    with closing(SimulatedBackend(node)) as backend:
        serving = Serving(path, backend, backlog=0)
        with ExitStack() as stack:
            _fill(path, stack)
            threading.Timer(0.05, serving.__enter__).start()
            try:
                with new_consumer().obtain(wanted) as handoff:
                    assert not handoff.is_degraded
            finally:
                wait_until(lambda: serving._thread.ident is not None)
                serving.__exit__(None, None, None)


def test_self_service_does_not_wait_until_the_provider_can_be_told(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    with ExitStack() as stack:

        def fill_and_hang_up(line: Line) -> None:
            line.hear()
            liar.stop_listening()
            liar._listener.close()
            path.unlink()
            stack.enter_context(_full_backlog(path))
            line.hang_up()

        liar = stack.enter_context(Liar(path, fill_and_hang_up))
        with Stopwatch() as watch:
            handoff = new_consumer(service=service, patience=Patience(connect_s=5)).obtain(wanted)
        assert watch.seconds < 2
        handoff.end(0.0)
        handoff.close()


@pytest.mark.clause("SELF-5")
def test_self_service_that_fails_too_is_reported_with_both_reasons(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, allocation_id: str
) -> None:
    request = NamespaceRequest(allocation_id, (MOUNT,), "missing.sqfs")
    with pytest.raises(CreationFailed, match=r"failed too: .*missing\.sqfs.*does not exist"):
        new_consumer(service=service).obtain(request)


def test_a_bug_of_self_service_is_a_failure_and_no_hang(
    new_consumer: NewConsumer, path: Path, wanted: NamespaceRequest
) -> None:
    class Broken(SimulatedBackend):
        def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
            raise RuntimeError("a bug")

    with (
        closing(SimulatedNode()) as node,
        closing(Broken(node)) as service,
        pytest.raises(CreationFailed, match="failed too: RuntimeError: a bug"),
    ):
        new_consumer(service=service).obtain(wanted)


def test_what_self_service_made_and_cannot_open_is_released(
    new_consumer: NewConsumer, path: Path, wanted: NamespaceRequest
) -> None:
    class Closed(SimulatedBackend):
        def bundle_of(self, allocation_id: str) -> DescriptorBundle:
            raise FdPassing("no descriptor is left")

    with closing(SimulatedNode()) as node, closing(Closed(node)) as service:
        with pytest.raises(CreationFailed, match="no descriptor is left"):
            new_consumer(service=service).obtain(wanted)
        assert node.is_clean


@pytest.mark.clause("SELF-2")
@pytest.mark.needs_root
def test_real_self_service_follows_the_nodes_conventions(
    new_consumer: NewConsumer, path: Path, wanted: NamespaceRequest, cgroup2: Path
) -> None:
    features = Features.probe()
    settings = NodeSettings(cgroup2=cgroup2)
    backend = LinuxBackend.for_self_service(settings, clock=lambda: 0.0, features=features)
    with closing(backend) as service:
        consumer = new_consumer(KernelInspector(features), service=service)
        scope = cgroup2 / "workload.slice" / f"{wanted.allocation_id}.scope"
        with consumer.obtain(wanted) as handoff:
            assert handoff.is_degraded
            assert [identity.kind for identity in handoff.identities] == list(ALL)
            assert scope.is_dir()
            assert handoff.end()
        assert not scope.exists()


# --- Reported, not papered over ----------------------------------------------------------------


@pytest.mark.clause("ERR-5")
@pytest.mark.parametrize("error", [CreationFailed("no room"), AllocationNotFound("a")], ids=repr)
def test_what_the_provider_refuses_is_reported(
    new_consumer: NewConsumer,
    path: Path,
    own_node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    error: NamespaceError,
) -> None:
    audited: list[Fallback] = []
    with Liar(path, _say(error)), pytest.raises(type(error)) as raised:
        new_consumer(service=service, audit=audited.append).obtain(wanted)
    assert raised.value == error
    assert not audited
    assert own_node.is_clean


def test_a_real_providers_refusal_is_reported(
    new_consumer: NewConsumer, provider: Serving, service: SimulatedBackend, allocation_id: str
) -> None:
    request = NamespaceRequest(allocation_id, (MOUNT,), "missing.sqfs")
    with pytest.raises(CreationFailed, match=r"ENOENT: missing\.sqfs"):
        new_consumer(service=service).obtain(request)


@pytest.mark.parametrize(
    "request_",
    [
        NamespaceRequest("", ()),
        NamespaceRequest("a/b", ALL),
        NamespaceRequest("x" * 70_000, ALL),
        NamespaceRequest("\ud800", ALL),
        NamespaceRequest("a", (PID, PID)),
        NamespaceRequest("a", (PID,), "hello.sqfs"),
        NamespaceRequest("a", (MOUNT,), "../hello.sqfs"),
    ],
    ids=["empty", "slash", "long", "surrogate", "repeated", "no mount", "escape"],
)
def test_an_invalid_request_is_refused_before_any_connection(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, request_: NamespaceRequest
) -> None:
    with Liar(path) as liar:
        with pytest.raises(CreationFailed):
            new_consumer(service=service).obtain(request_)
        assert not liar.lines


# --- Never two live sets -----------------------------------------------------------------------


@pytest.mark.clause("SELF-9")
def test_a_late_answer_is_closed_and_answered_with_the_end(
    new_consumer: NewConsumer,
    path: Path,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    lent: tuple[int, ...],
) -> None:
    ended = AllocationEnded(wanted.allocation_id)

    def answer_late(line: Line) -> None:
        line.hear()
        assert line.hear() == ended
        line.say(answer_to(wanted), lent)
        line.say(ended)

    with (
        Liar(path, answer_late) as liar,
        new_consumer(service=service, patience=HASTY).obtain(wanted) as handoff,
    ):
        assert handoff.settle()
        assert liar.told(0) == [wanted, ended]
        assert copies_of(lent) == len(lent)
        handoff.end()


@pytest.mark.clause("SELF-7")
def test_a_late_answer_does_not_change_what_the_caller_holds(
    new_consumer: NewConsumer,
    path: Path,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    lent: tuple[int, ...],
) -> None:
    ended = AllocationEnded(wanted.allocation_id)

    def answer_late(line: Line) -> None:
        line.hear()
        line.hear()
        line.say(answer_to(wanted), lent)
        line.say(ended)

    consumer = new_consumer(service=service, patience=HASTY)
    with Liar(path, answer_late), consumer.obtain(wanted) as handoff:
        handoff.settle()
        inspect = SimulatedInspector().inspect
        assert handoff.identities == tuple(inspect(fd) for fd in handoff.bundle.filenos())
        handoff.end()


def test_a_real_providers_late_set_is_ended(
    new_consumer: NewConsumer,
    path: Path,
    own_node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
) -> None:
    may_go_on = threading.Event()

    def wait_at_anchor(step: Step, name: str) -> None:
        if step is Step.ANCHOR:
            assert may_go_on.wait(10)

    with (
        a_node(hook=wait_at_anchor) as (node, backend),
        Serving(path, backend),
        new_consumer(service=service, patience=HASTY).obtain(wanted) as handoff,
    ):
        may_go_on.set()
        assert handoff.settle()
        wait_until(lambda: node.is_clean, "the provider's release")
        assert not own_node.is_clean
        handoff.end()


@pytest.mark.clause("SELF-8")
def test_the_end_is_told_on_a_new_connection_when_the_old_one_is_lost(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    with (
        Liar(path, _hang_up) as liar,
        new_consumer(service=service, patience=HASTY).obtain(wanted) as handoff,
    ):
        assert handoff.settle()
        assert liar.told(1) == [AllocationEnded(wanted.allocation_id)]
        handoff.end()


@contextmanager
def in_debt(
    consumer: Any, path: Path, request: NamespaceRequest
) -> Iterator[tuple[Any, Callable[[], Liar]]]:
    """A handoff whose provider may have made a set, and died; and a way to bring one back."""

    def die(line: Line) -> None:
        line.hear()
        liar.stop_listening()
        path.unlink()
        line.hang_up()

    with ExitStack() as stack:
        liar = stack.enter_context(Liar(path, die))
        handoff = consumer.obtain(request)
        stack.callback(handoff.close)
        assert handoff.owes_end
        yield handoff, lambda: stack.enter_context(Liar(path))


def test_a_debt_is_paid_by_settling_when_the_provider_is_back(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    consumer = new_consumer(service=service, patience=HASTY)
    with in_debt(consumer, path, wanted) as (handoff, revive):
        liar = revive()
        assert handoff.settle()
        assert liar.told(0) == [AllocationEnded(wanted.allocation_id)]
        handoff.end()


def test_a_debt_is_paid_by_leaving_the_context(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    consumer = new_consumer(service=service, patience=HASTY)
    with in_debt(consumer, path, wanted) as (handoff, revive):
        liar = revive()
        with handoff:
            pass
        assert not handoff.owes_end
        assert liar.told(0) == [AllocationEnded(wanted.allocation_id)]


def test_a_debt_is_said_by_closing(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    consumer = new_consumer(service=service, patience=Patience(redial_s=60.0))
    with in_debt(consumer, path, wanted) as (handoff, revive):
        liar = revive()
        handoff.close()
        assert liar.told(0) == [AllocationEnded(wanted.allocation_id)]


def test_a_debt_is_paid_in_the_background_of_an_event_loop(
    path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    def die(line: Line) -> None:
        line.hear()
        liar.stop_listening()
        path.unlink()
        line.hang_up()

    async def main() -> None:
        consumer = AsyncConsumer(path, SimulatedInspector(), service=service, patience=HASTY)
        async with await consumer.obtain(wanted) as handoff:
            assert handoff.owes_end
            with Liar(path) as revived:
                while handoff.owes_end:
                    await asyncio.sleep(0.002)
                assert revived.told(0) == [AllocationEnded(wanted.allocation_id)]
            await handoff.end()

    with Liar(path, die) as liar:
        asyncio.run(asyncio.wait_for(main(), 10))


def test_a_debt_that_cannot_be_paid_does_not_hold_up_the_caller(
    new_consumer: NewConsumer, path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    consumer = new_consumer(service=service, patience=HASTY)
    with in_debt(consumer, path, wanted) as (handoff, _):
        with Stopwatch() as watch:
            assert not handoff.settle(0.05)
            handoff.close()
        assert watch.seconds < 1.0


# --- The caller's end --------------------------------------------------------------------------


@pytest.mark.clause("SELF-11")
def test_an_end_releases_the_providers_set(
    new_consumer: NewConsumer, provider: Serving, node: SimulatedNode, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        assert handoff.end()
        assert handoff.is_ended
        assert node.is_clean


def test_an_end_has_released_the_own_set_when_it_returns(
    new_consumer: NewConsumer,
    path: Path,
    own_node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
) -> None:
    with new_consumer(service=service).obtain(wanted) as handoff:
        assert handoff.end()
        assert own_node.is_clean


def test_an_end_of_an_own_set_waits_for_its_processes_to_die(
    new_consumer: NewConsumer,
    path: Path,
    own_node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
) -> None:
    with new_consumer(service=service).obtain(wanted) as handoff:
        own_node.start_process(wanted.allocation_id)
        assert handoff.end()
        assert own_node.is_clean


def test_an_own_set_that_does_not_die_is_reported(
    new_consumer: NewConsumer,
    path: Path,
    own_node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "OWN_RELEASE_PAUSE_MAX_S", 0.005)
    with new_consumer(service=service).obtain(wanted) as handoff:
        own_node.start_process(wanted.allocation_id)
        own_node.hang(wanted.allocation_id)
        assert handoff.end()
        assert "is not released: 1 processes do not die" in caplog.text


def test_an_end_can_be_said_twice(
    new_consumer: NewConsumer, provider: Serving, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        assert handoff.end()
        assert handoff.end()


def test_an_end_can_be_said_after_the_context_was_left(
    new_consumer: NewConsumer, provider: Serving, node: SimulatedNode, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        pass
    assert handoff.end(5.0)
    assert node.is_clean


def test_an_end_of_an_own_set_can_be_said_after_the_context_was_left(
    new_consumer: NewConsumer,
    path: Path,
    own_node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
) -> None:
    with new_consumer(service=service).obtain(wanted) as handoff:
        pass
    assert handoff.end(5.0)
    assert own_node.is_clean


def test_an_end_after_the_connection_was_lost_goes_over_a_new_one(
    new_consumer: NewConsumer, path: Path, node: SimulatedNode, wanted: NamespaceRequest
) -> None:
    consumer = new_consumer(patience=HASTY)
    with closing(SimulatedBackend(node)) as backend, Serving(path, backend):
        handoff = consumer.obtain(wanted)
    with (
        handoff,
        closing(SimulatedBackend(node)) as backend,
        Serving(path, backend),
    ):
        assert not handoff.wait_ended(0.0)
        assert handoff.end(5.0)
        assert node.is_clean


def test_an_end_that_nobody_confirms_returns_in_time_and_goes_on_later(
    new_consumer: NewConsumer, path: Path, wanted: NamespaceRequest, lent: tuple[int, ...]
) -> None:
    may_confirm = threading.Event()

    def confirm_late(line: Line) -> None:
        line.hear()
        line.say(answer_to(wanted), lent)
        line.hear()
        assert may_confirm.wait(10)
        line.say(AllocationEnded(wanted.allocation_id))

    with Liar(path, confirm_late), new_consumer().obtain(wanted) as handoff:
        assert not handoff.end(0.02)
        may_confirm.set()
        assert handoff.end(5.0)


def test_an_end_the_provider_does_not_know_is_an_end(
    new_consumer: NewConsumer, path: Path, wanted: NamespaceRequest, lent: tuple[int, ...]
) -> None:
    def forget(line: Line) -> None:
        line.hear()
        line.say(answer_to(wanted), lent)
        line.hear()
        line.say(AllocationNotFound(wanted.allocation_id))

    with Liar(path, forget), new_consumer().obtain(wanted) as handoff:
        assert handoff.end()


@pytest.mark.clause("WIRE-15")
def test_a_pushed_end_is_noticed(
    new_consumer: NewConsumer, provider: Serving, node: SimulatedNode, wanted: NamespaceRequest
) -> None:
    with new_consumer().obtain(wanted) as handoff:
        assert not handoff.wait_ended(0.0)
        node.start_process(wanted.allocation_id)
        node.end_process(wanted.allocation_id)
        assert handoff.wait_ended(5.0)
        assert handoff.end()


@pytest.mark.clause("END-15")
def test_a_push_and_an_end_may_cross(
    new_consumer: NewConsumer, path: Path, wanted: NamespaceRequest, lent: tuple[int, ...]
) -> None:
    ended = AllocationEnded(wanted.allocation_id)

    def cross(line: Line) -> None:
        line.hear()
        line.say(answer_to(wanted), lent)
        line.say(ended)
        if line.hear() is not None:
            line.say(ended)

    with Liar(path, cross) as liar, new_consumer().obtain(wanted) as handoff:
        assert handoff.end()
        assert liar.told(0) in ([wanted], [wanted, ended])


@pytest.mark.clause("CRASH-13")
def test_losing_the_provider_is_no_end(
    new_consumer: NewConsumer, path: Path, wanted: NamespaceRequest, lent: tuple[int, ...]
) -> None:
    def hand_over_and_die(line: Line) -> None:
        line.hear()
        line.say(answer_to(wanted), lent)
        line.hang_up()

    with Liar(path, hand_over_and_die), new_consumer().obtain(wanted) as handoff:
        assert not handoff.wait_ended(0.05)
        assert not handoff.bundle.closed


# --- Ending what one does not hold ---------------------------------------------------------------


def test_an_allocation_can_be_ended_by_its_id(
    path: Path, provider: Serving, node: SimulatedNode, wanted: NamespaceRequest
) -> None:
    consumer = Consumer(path, SimulatedInspector())
    with consumer.obtain(wanted) as handoff:
        consumer.end(wanted.allocation_id)
        assert node.is_clean
        assert handoff.wait_ended(5.0)


def test_an_end_by_id_can_be_repeated(
    path: Path, provider: Serving, wanted: NamespaceRequest
) -> None:
    with closing(Consumer(path, SimulatedInspector())) as consumer:
        consumer.obtain(wanted).close()
        consumer.end(wanted.allocation_id)
        consumer.end(wanted.allocation_id)


def test_an_end_of_an_unknown_id_says_so(path: Path, provider: Serving, allocation_id: str) -> None:
    with pytest.raises(AllocationNotFound, match=allocation_id):
        Consumer(path, SimulatedInspector()).end(allocation_id)


@pytest.mark.parametrize("name", ["", "a/b", "\ud800", "x" * 70_000], ids=range(4))
def test_an_end_of_an_impossible_id_says_so_without_asking(path: Path, name: str) -> None:
    with Liar(path) as liar:
        with pytest.raises(AllocationNotFound):
            Consumer(path, SimulatedInspector()).end(name)
        assert not liar.lines


def test_an_end_that_reaches_nobody_says_so(path: Path, allocation_id: str) -> None:
    consumer = Consumer(path, SimulatedInspector(), patience=HASTY)
    with pytest.raises(SocketUnavailable, match="does not exist"):
        consumer.end(allocation_id, timeout_s=0.05)


def test_an_end_by_id_that_nobody_confirms_says_so(path: Path, allocation_id: str) -> None:
    with Liar(path, _say_nothing), pytest.raises(SocketUnavailable, match="did not confirm"):
        Consumer(path, SimulatedInspector()).end(allocation_id, timeout_s=0.05)


def test_an_end_is_repeated_on_a_new_connection(path: Path, allocation_id: str) -> None:
    with Liar(path, _hang_up) as liar:
        Consumer(path, SimulatedInspector(), patience=HASTY).end(allocation_id)
        assert liar.told(1) == [AllocationEnded(allocation_id)]


# --- Cancellation ------------------------------------------------------------------------------


async def _cancel_when(
    task: asyncio.Task[Any], happened: Callable[[], object], times: int = 1
) -> None:
    async def until_happened() -> None:
        while not happened():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(until_happened(), 10)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_while_the_provider_is_called(
    path: Path,
    own_node: SimulatedNode,
    service: SimulatedBackend,
    wanted: NamespaceRequest,
    times: int,
) -> None:
    async def main() -> None:
        patience = Patience(connect_s=30.0)
        consumer = AsyncConsumer(path, SimulatedInspector(), service=service, patience=patience)
        task = asyncio.create_task(consumer.obtain(wanted))
        await asyncio.sleep(0)
        await _cancel_when(task, lambda: True, times)

    with _full_backlog(path), Stopwatch() as watch:
        asyncio.run(main())
    assert watch.seconds < 1.0
    assert own_node.is_clean


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_while_asking_the_provider_is_told(
    path: Path, service: SimulatedBackend, wanted: NamespaceRequest, times: int
) -> None:
    async def main(liar: Liar) -> None:
        consumer = AsyncConsumer(path, SimulatedInspector(), service=service)
        task = asyncio.create_task(consumer.obtain(wanted))
        await _cancel_when(task, lambda: liar.lines and liar.lines[0].heard, times)

    with Liar(path, _say_nothing) as liar:
        asyncio.run(main(liar))
        assert liar.told(0) == [wanted, AllocationEnded(wanted.allocation_id)]


def test_cancelled_with_the_answer_unread_nothing_stays_open(
    path: Path, wanted: NamespaceRequest, lent: tuple[int, ...]
) -> None:
    answered = threading.Event()

    def answer(line: Line) -> None:
        line.hear()
        line.say(answer_to(wanted), lent)
        answered.set()

    async def main() -> None:
        consumer = AsyncConsumer(path, SimulatedInspector())
        task = asyncio.create_task(consumer.obtain(wanted))
        for _ in range(3):
            await asyncio.sleep(0)
        # The loop is not let near the socket any more.
        assert answered.wait(10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Liar(path, answer) as liar:
        asyncio.run(main())
        assert copies_of(lent) == len(lent)
        assert liar.told(0) == [wanted, AllocationEnded(wanted.allocation_id)]


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_during_self_service_what_it_makes_is_released(
    path: Path, wanted: NamespaceRequest, times: int
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def wait_at_anchor(step: Step, name: str) -> None:
        if step is Step.ANCHOR:
            begun.set()
            assert may_go_on.wait(10)

    async def main(service: SimulatedBackend) -> None:
        consumer = AsyncConsumer(path, SimulatedInspector(), service=service)
        task = asyncio.create_task(consumer.obtain(wanted))
        asyncio.get_running_loop().call_later(0.1, may_go_on.set)
        await _cancel_when(task, begun.is_set, times)

    with a_node(hook=wait_at_anchor) as (node, service):
        asyncio.run(main(service))
        assert node.is_clean


def test_cancelled_during_self_service_the_provider_is_told_as_well(
    path: Path, wanted: NamespaceRequest
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def wait_at_anchor(step: Step, name: str) -> None:
        if step is Step.ANCHOR:
            begun.set()
            assert may_go_on.wait(10)

    async def main(service: SimulatedBackend) -> None:
        consumer = AsyncConsumer(path, SimulatedInspector(), service=service)
        task = asyncio.create_task(consumer.obtain(wanted))
        asyncio.get_running_loop().call_later(0.05, may_go_on.set)
        await _cancel_when(task, begun.is_set)

    with a_node(hook=wait_at_anchor) as (_, service), Liar(path, _hang_up) as liar:
        asyncio.run(main(service))
        assert liar.told(1) == [AllocationEnded(wanted.allocation_id)]


def test_cancelled_when_the_answer_is_in_hand_the_provider_is_told(
    path: Path, wanted: NamespaceRequest, lent: tuple[int, ...]
) -> None:
    def answer(line: Line) -> None:
        line.hear()
        line.say(answer_to(wanted), lent)

    class Cancelling(SimulatedInspector):
        """Asked while the answer is being looked at, in the very turn of the loop."""

        def own(self, kind: NamespaceType) -> None:
            task.cancel()

    async def main() -> None:
        nonlocal task
        task = asyncio.create_task(AsyncConsumer(path, Cancelling()).obtain(wanted))
        with pytest.raises(asyncio.CancelledError):
            await task

    task: asyncio.Task[Any]
    with Liar(path, answer) as liar:
        asyncio.run(main())
        assert copies_of(lent) == len(lent)
        assert liar.told(0) == [wanted, AllocationEnded(wanted.allocation_id)]


def test_cancelled_while_leaving_the_context_everything_is_closed(
    path: Path, service: SimulatedBackend, wanted: NamespaceRequest
) -> None:
    def die(line: Line) -> None:
        line.hear()
        liar.stop_listening()
        path.unlink()
        line.hang_up()

    async def main() -> None:
        consumer = AsyncConsumer(path, SimulatedInspector(), service=service)
        handoff = await consumer.obtain(wanted)
        task = asyncio.create_task(handoff.__aexit__(None, None, None))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert handoff.bundle.closed

    with Liar(path, die) as liar:
        asyncio.run(main())


def test_a_wait_that_is_cancelled_can_be_begun_again(
    path: Path, provider: Serving, node: SimulatedNode, wanted: NamespaceRequest
) -> None:
    async def main() -> None:
        async with await AsyncConsumer(path, SimulatedInspector()).obtain(wanted) as handoff:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(handoff.wait_ended(), 0.01)
            node.start_process(wanted.allocation_id)
            node.end_process(wanted.allocation_id)
            await asyncio.wait_for(handoff.wait_ended(), 5.0)

    asyncio.run(main())


# --- Many at once ------------------------------------------------------------------------------


def test_many_allocations_in_one_loop(
    path: Path, provider: Serving, node: SimulatedNode, allocation_id: str
) -> None:
    async def one(consumer: AsyncConsumer, number: int) -> object:
        request = NamespaceRequest(f"{allocation_id}-{number}", ALL)
        async with await consumer.obtain(request) as handoff:
            assert handoff.response == answer_to(request)
            await handoff.end()
            return handoff.identities

    async def main() -> list[object]:
        consumer = AsyncConsumer(path, SimulatedInspector())
        return await asyncio.gather(*(one(consumer, number) for number in range(100)))

    assert len(set(asyncio.run(main()))) == 100
    assert node.is_clean


def test_many_consumers_of_one_allocation_get_the_same(
    path: Path, provider: Serving, wanted: NamespaceRequest
) -> None:
    async def main() -> None:
        consumer = AsyncConsumer(path, SimulatedInspector())
        async with asyncio.timeout(10):
            handoffs = await asyncio.gather(*(consumer.obtain(wanted) for _ in range(30)))
        assert len({handoff.identities for handoff in handoffs}) == 1
        for handoff in handoffs:
            await handoff.close()

    asyncio.run(main())


def test_many_serve_themselves_in_one_loop(
    path: Path, own_node: SimulatedNode, service: SimulatedBackend, allocation_id: str
) -> None:
    async def one(consumer: AsyncConsumer, number: int) -> None:
        request = NamespaceRequest(f"{allocation_id}-{number}", ALL)
        async with await consumer.obtain(request) as handoff:
            assert handoff.is_degraded
            await handoff.end()

    async def main() -> None:
        consumer = AsyncConsumer(path, SimulatedInspector(), service=service)
        await asyncio.gather(*(one(consumer, number) for number in range(30)))

    asyncio.run(main())
    assert own_node.is_clean


def test_an_interrupted_caller_tells_the_provider(path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def silent(line: Line) -> None:
        line.hear()
        wait_until(lambda: sys._current_frames()[caller].f_code.co_name == "_wait")
        os.kill(os.getpid(), signal.SIGUSR1)

    caller = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, interrupt)
    request = NamespaceRequest("interrupted", (NamespaceType.PID,))
    try:
        with Liar(path, silent) as provider:
            with pytest.raises(KeyboardInterrupt):
                Consumer(path, SimulatedInspector()).obtain(request)
            assert provider.told(0) == [request, AllocationEnded("interrupted")]
    finally:
        signal.signal(signal.SIGUSR1, before)
