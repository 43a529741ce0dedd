"""The consumer against real sockets: whatever the provider does, one live set, in time, loudly.

Both forms, `Consumer` and `AsyncConsumer`, are held to the same through `support/consumers.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import pytest

import linux
from linux.simulated import SimulatedBackend, SimulatedInspector, SimulatedNode
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
from statemachine.states import AllocationState
from tests.support.consumers import FORMS, Form, Stopwatch
from tests.support.programs import run_program
from tests.support.serving import Serving
from transport.contract import Step
from transport.descriptors import Descriptor, DescriptorBundle
from transport.endpoint import listen
from transport.request import (
    AUDIT_EVENT,
    AsyncConsumer,
    AsyncHandoff,
    Cancelled,
    Consumer,
    Fallback,
    Handoff,
    Patience,
    exchange,
)
from transport.request.exchange import BaseConsumer
from transport.serve import Spans
from transport.testing.peer import DEADLINE_S, Liar, Line, Script, copies_of, frame_of, wait_until

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)
ROOT: Final = Path(__file__).parents[2]

HASTY: Final = Patience(connect_s=0.05, answer_s=0.1, redial_s=0.02)
"""For providers that will not answer."""


class Bench:
    """Two nodes, a path, and the consumers and providers that a test starts; closed after it."""

    def __init__(self, form: Form, path: Path, name: str, stack: ExitStack) -> None:
        self.path: Final = path
        self.wanted: Final = NamespaceRequest(name, ALL)
        self.answer: Final = NamespaceResponse(name, ALL)
        self.ended: Final = AllocationEnded(name)
        self._form = form
        self._stack = stack

    def _node(self) -> SimulatedNode:
        return self._stack.enter_context(closing(SimulatedNode(frozenset({"hello.sqfs"}))))

    @cached_property
    def node(self) -> SimulatedNode:
        """Where the provider works."""
        return self._node()

    @cached_property
    def own(self) -> SimulatedNode:
        """Where self-service works: its namespaces are told from the provider's by their node."""
        return self._node()

    @cached_property
    def service(self) -> SimulatedBackend:
        return self._stack.enter_context(closing(SimulatedBackend(self.own)))

    @cached_property
    def lent(self) -> tuple[int, ...]:
        """Three simulated namespaces for a hand-made provider to hand over."""
        return tuple(
            self._stack.enter_context(
                Descriptor(os.memfd_create(f"nshandoff-{kind.value}-{900 + number}"))
            ).fileno()
            for number, kind in enumerate(ALL)
        )

    def consumer(self, inspector: Any = None, **options: Any) -> Any:
        made = self._form(self.path, inspector or SimulatedInspector(), **options)
        return self._stack.enter_context(closing(made))

    def obtain(self, **options: Any) -> Any:
        return self.consumer(**options).obtain(self.wanted)

    def provide(self) -> Serving:
        """Start a provider."""
        backend = self._stack.enter_context(closing(SimulatedBackend(self.node)))
        return self._stack.enter_context(Serving(self.path, backend))

    def lie(self, *scripts: Script) -> Liar:
        """Start a hand-made provider."""
        return self._stack.enter_context(Liar(self.path, *scripts))

    def hand_over(self, line: Line) -> None:
        """Be a provider that does what it is asked."""
        line.hear()
        line.say(self.answer, self.lent)

    def identities(self, bundle: DescriptorBundle) -> tuple[Any, ...]:
        return tuple(map(SimulatedInspector().inspect, bundle.filenos()))


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__.lower())
def rig(request: pytest.FixtureRequest, tmp_path: Path, allocation_id: str) -> Iterator[Bench]:
    """For either form of the consumer."""
    with ExitStack() as stack:
        yield Bench(request.param, tmp_path / "s", allocation_id, stack)


@pytest.fixture
def plain(tmp_path: Path, allocation_id: str) -> Iterator[Bench]:
    """For tests of one form, or of both at once."""
    with ExitStack() as stack:
        yield Bench(Consumer, tmp_path / "s", allocation_id, stack)


class AtAnchor:
    """A hook that holds a creation up in the middle."""

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, step: Step, name: str) -> None:
        if step is Step.ANCHOR:
            self.begun.set()
            assert self.may_go_on.wait(10)


# --- Handed over -------------------------------------------------------------------------------

ORDERS: Final = [order for count in range(4) for order in permutations(ALL, count)]


@pytest.mark.clause("FD-5", "FD-12")
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_basic_a_handoff_has_what_was_asked_for_in_that_order(
    rig: Bench, order: tuple[NamespaceType, ...]
) -> None:
    rig.provide()
    name = rig.wanted.allocation_id
    with rig.consumer().obtain(NamespaceRequest(name, order)) as handoff:
        assert handoff.response == NamespaceResponse(name, order)
        assert handoff.bundle.types == order
        assert handoff.identities == rig.identities(handoff.bundle)
        assert [identity.kind for identity in handoff.identities] == list(order)
        assert not any(os.get_inheritable(fd) for fd in handoff.bundle.filenos())
        assert not handoff.is_degraded
    assert handoff.bundle.closed
    handoff.close()


def test_the_mount_path_is_the_providers(rig: Bench) -> None:
    rig.provide()
    request = NamespaceRequest(rig.wanted.allocation_id, (MOUNT,), "hello.sqfs")
    with rig.consumer().obtain(request) as handoff:
        assert handoff.response.uenv_mount_path == "/run/pact/uenv/hello"


def test_detached_descriptors_survive_the_handoff(rig: Bench) -> None:
    rig.provide()
    with rig.obtain() as handoff:
        mine = [Descriptor(fd) for fd in handoff.bundle.detach()]
    with DescriptorBundle(ALL, mine) as bundle:
        assert rig.identities(bundle) == handoff.identities


def test_the_seeds_method_keeps_the_handoff_to_be_taken(rig: Bench) -> None:
    rig.provide()
    consumer = rig.consumer()
    response = consumer.request_namespaces(rig.wanted)
    with consumer.handoff_of(rig.wanted.allocation_id) as handoff:
        assert handoff.response is response
    with pytest.raises(KeyError):
        consumer.handoff_of(rig.wanted.allocation_id)


def test_a_handoff_that_is_not_taken_is_closed_when_replaced_and_with_its_consumer(
    rig: Bench,
) -> None:
    rig.provide()
    consumer, kept = rig.consumer(), []
    for _ in range(2):
        consumer.request_namespaces(rig.wanted)
        kept.append(consumer._handoffs[rig.wanted.allocation_id])
    assert [handoff.bundle.closed for handoff in kept] == [True, False]
    consumer.close()
    assert kept[1].bundle.closed


FORM_PAIRS: Final = [
    (Consumer, AsyncConsumer),
    (linux.Consumer, linux.AsyncConsumer),
    (Handoff, AsyncHandoff),
]


@pytest.mark.parametrize(("blocking", "awaiting"), FORM_PAIRS, ids=lambda kind: kind.__name__)
def test_both_forms_have_the_same_verbs(blocking: type, awaiting: type) -> None:
    theirs = {name.replace("__a", "__"): names for name, names in _surface(awaiting).items()}
    # A task can be cancelled as it is.
    ours = {
        n: names and [x for x in names if x != "cancel"] for n, names in _surface(blocking).items()
    }
    assert ours == theirs
    assert {"end", "close", "__enter__", "__exit__"} <= set(theirs)
    for name, verb in inspect.getmembers(awaiting, inspect.isfunction):
        is_public = not name.startswith("_") or name in ("__aenter__", "__aexit__")
        if is_public and name != "handoff_of":
            assert inspect.iscoroutinefunction(verb), name


def _surface(kind: type) -> dict[str, list[str] | None]:
    """What a class offers: its properties, and its verbs with the names of their parameters."""
    special = {"__aenter__", "__aexit__", "__enter__", "__exit__"}
    if issubclass(kind, BaseConsumer):
        special.add("__init__")
    return {
        name: None if isinstance(found, property) else [*inspect.signature(found).parameters]
        for name, found in inspect.getmembers(kind)
        if name in special or not name.startswith("_")
    }


def test_what_they_are_is_shown(rig: Bench) -> None:
    rig.provide()
    consumer = rig.consumer()
    assert repr(consumer).endswith(f"onsumer of {str(rig.path)!r}, without self-service>")
    with consumer.obtain(NamespaceRequest("a", (PID,))) as handoff:
        (fd,) = handoff.bundle.filenos()
        shown = f"andoff 'a' by the provider, held: DescriptorBundle(Pid: Descriptor({fd}))>"
        assert repr(handoff).endswith(shown)


@pytest.mark.parametrize(
    "program", ["from transport.request import Consumer", "from linux import Consumer; Consumer()"]
)
def test_a_consumer_that_blocks_does_not_import_asyncio(program: str) -> None:
    run = run_program(sys.executable, "-c", f"import sys; {program}; print(*sys.modules)")
    loaded = set(run.stdout.split())
    assert "transport.request.blocking" in loaded
    assert loaded.isdisjoint({"asyncio", "transport.serve", "linux.backend", "subprocess"})


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
    with (
        closing(SimulatedNode()) as node,
        closing(SimulatedBackend(node)) as backend,
        Serving(path, backend, limits=limits),
    ):
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


@pytest.mark.clause("SELF-1", "SELF-4", "ERR-6")
@pytest.mark.needs_root
@unreachable
def test_without_a_provider_the_consumer_serves_itself_loudly_and_in_time(
    rig: Bench,
    caplog: pytest.LogCaptureFixture,
    situation: Callable[[Path], AbstractContextManager[object]],
    reason: str,
) -> None:
    audited: list[Fallback] = []
    consumer = rig.consumer(service=rig.service, patience=HASTY, audit=audited.append)
    with situation(rig.path):
        with Stopwatch() as watch:
            handoff = consumer.obtain(rig.wanted)
        # Far below the default deadlines, with room for a machine that has other things to do.
        assert watch.seconds < 0.9
        with handoff:
            assert handoff.is_degraded
            assert reason in handoff.fallback.text
            assert handoff.response == rig.answer
            with rig.service.bundle_of(rig.wanted.allocation_id) as own:
                assert handoff.identities == rig.identities(own)
            handoff.end()
    assert audited == [Fallback(rig.wanted.allocation_id, handoff.fallback, AUDIT_EVENT)]
    (warning,) = [r for r in caplog.records if r.name == exchange.__name__]
    assert warning.levelno == logging.WARNING
    assert "namespace.handoff_failed" in warning.getMessage()
    assert reason in warning.getMessage()


@pytest.mark.clause("SELF-16")
def test_a_consumer_without_a_path_asks_no_provider_and_complains_of_none(
    rig: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig.path, audited = None, []  # type: ignore[assignment]
    monkeypatch.setattr(exchange, "begin_connect", None)  # a call would raise
    with rig.obtain(service=rig.service, audit=audited.append) as handoff:
        assert (handoff.is_own, handoff.is_degraded, handoff.fallback) == (True, False, None)
        assert handoff.response == rig.answer
        handoff.end()
    assert (audited, caplog.records) == ([], [])
    assert not rig.service.why_alive(rig.wanted.allocation_id)
    with pytest.raises(SocketUnavailable, match="no provider"):
        rig.obtain()


@pytest.mark.clause("SELF-6")
@pytest.mark.needs_root
@unreachable
def test_without_self_service_the_original_error_is_raised(
    rig: Bench, situation: Callable[[Path], AbstractContextManager[object]], reason: str
) -> None:
    with situation(rig.path), pytest.raises((SocketUnavailable, FdPassing), match=reason):
        rig.obtain(patience=HASTY)


@pytest.mark.clause("ERR-6")
def test_an_answer_cut_off_at_any_byte_is_no_answer(rig: Bench) -> None:
    frame = frame_of(rig.answer)
    cuts = iter(range(len(frame)))

    def cut_off(line: Line) -> None:
        if isinstance(line.hear(), AllocationEnded):
            line.say(rig.ended)
            return
        cut = next(cuts)
        if cut:
            line.say(frame[:cut], rig.lent)
        line.hang_up()
        line.is_over.set()

    consumer = rig.consumer(patience=Patience(redial_s=0.01))
    rig.lie(*[cut_off] * (2 * len(frame)))
    for cut in range(len(frame)):
        place = "in the middle of a frame" if cut else "the connection"
        with pytest.raises(SocketUnavailable, match=f"the peer closed {place}"):
            consumer.obtain(rig.wanted)
        assert copies_of(rig.lent) == len(rig.lent)


def test_a_user_who_may_not_connect_is_told_so() -> None:
    script = """
import os, sys
import linux
from linux.simulated import SimulatedInspector
from statemachine.errors import SocketUnavailable
from statemachine.messages import NamespaceRequest
from transport.request import Consumer
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
try:
    Consumer(sys.argv[1], SimulatedInspector()).obtain(NamespaceRequest("a", ()))
except SocketUnavailable as error:
    print(error)
"""
    with tempfile.TemporaryDirectory(prefix="nsh-") as directory:
        Path(directory).chmod(0o755)
        with listen(Path(directory) / "s"):
            if os.geteuid() != 0:  # the user stays the same
                Path(directory, "s").chmod(0)
            result = run_program(sys.executable, "-c", script, f"{directory}/s")
    assert "Permission denied" in result.stdout, result.stderr


@pytest.mark.clause("SELF-3")
def test_only_this_allocation_is_self_served(rig: Bench) -> None:
    consumer = rig.consumer(service=rig.service)
    with consumer.obtain(rig.wanted) as degraded:
        rig.provide()
        with consumer.obtain(NamespaceRequest("other", ALL)) as handoff:
            assert degraded.is_degraded
            assert not handoff.is_degraded
        degraded.end()


@pytest.mark.clause("SELF-1")
@pytest.mark.parametrize("connect_s", [1.0, 0.0])
def test_a_full_backlog_that_empties_in_time_is_waited_for(rig: Bench, connect_s: float) -> None:
    with closing(SimulatedBackend(rig.node)) as backend, ExitStack() as stack:
        serving = Serving(rig.path, backend, backlog=0)
        _fill(rig.path, stack)
        threading.Timer(0.05, serving.__enter__).start()
        try:
            with rig.obtain(patience=Patience(connect_s)) as handoff:
                assert not handoff.is_degraded
        finally:
            wait_until(lambda: serving._thread.ident is not None)
            serving.__exit__(None, None, None)


@pytest.mark.clause("SELF-1")
def test_a_full_backlog_lets_a_consumer_in_before_those_that_come_again(rig: Bench) -> None:
    """Also while others that wait for room fill it at once."""
    is_over = threading.Event()

    def come_again_and_again() -> None:
        while not is_over.is_set():
            with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
                sock.connect(str(rig.path))
                sock.sendall(b"x")

    with ThreadPoolExecutor(5) as others, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.path))
        listener.listen(0)
        for _ in range(4):
            others.submit(come_again_and_again)
        with ExitStack() as full:
            _fill(rig.path, full)
        asking = others.submit(rig.obtain)
        # Tried again every 10 ms, it would be let in after hundreds.
        is_in = any(_accept_slowly(listener) == b"\0" for _ in range(20))
        is_over.set()
        listener.close()
        assert isinstance(asking.exception(), NamespaceError)
    assert is_in


def _accept_slowly(listener: socket.socket) -> bytes:
    """Accept one connection, and return the first byte of what it says."""
    time.sleep(0.002)
    sock, _ = listener.accept()
    with sock:
        return sock.recv(1)


def test_self_service_does_not_wait_until_the_provider_can_be_told(rig: Bench) -> None:
    with ExitStack() as stack:

        def fill_and_hang_up(line: Line) -> None:
            line.hear()
            liar.stop_listening()
            liar._listener.close()
            rig.path.unlink()
            stack.enter_context(_full_backlog(rig.path))
            line.hang_up()

        liar = rig.lie(fill_and_hang_up)
        with Stopwatch() as watch:
            handoff = rig.obtain(service=rig.service, patience=Patience(connect_s=5))
        assert watch.seconds < 2
        handoff.end(0.0)
        handoff.close()


class BuggyBackend(SimulatedBackend):
    """Has a bug."""

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        raise RuntimeError("a bug")


class Closed(SimulatedBackend):
    """Cannot open what it makes."""

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        raise FdPassing("no descriptor is left")


@pytest.mark.clause("SELF-5")
@pytest.mark.parametrize(
    ("kind", "image", "reason"),
    [
        (SimulatedBackend, "missing.sqfs", r"failed too: .*missing\.sqfs.*does not exist"),
        (BuggyBackend, None, "failed too: RuntimeError: a bug .*does not exist"),
        (Closed, None, "failed too: no descriptor is left .*does not exist"),
    ],
    ids=["refuses", "has a bug", "cannot open"],
)
def test_self_service_that_fails_too_says_both_reasons_and_leaves_nothing(
    rig: Bench, kind: type[SimulatedBackend], image: str | None, reason: str
) -> None:
    request = NamespaceRequest(rig.wanted.allocation_id, ALL, image)
    with closing(kind(rig.own)) as service:
        with pytest.raises(CreationFailed, match=reason):
            rig.consumer(service=service).obtain(request)
        assert rig.own.is_clean


# --- Reported, not papered over ----------------------------------------------------------------


@pytest.mark.clause("ERR-5")
@pytest.mark.parametrize("error", [CreationFailed("no room"), AllocationNotFound("a")], ids=repr)
def test_what_the_provider_refuses_is_reported(rig: Bench, error: NamespaceError) -> None:
    audited: list[Fallback] = []
    rig.lie(_say(error))
    with pytest.raises(type(error)) as raised:
        rig.obtain(service=rig.service, audit=audited.append)
    assert raised.value == error
    assert not audited
    assert rig.own.is_clean


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
    rig: Bench, request_: NamespaceRequest
) -> None:
    liar = rig.lie()
    with pytest.raises(CreationFailed):
        rig.consumer(service=rig.service).obtain(request_)
    assert not liar.lines


# --- Never two live sets -----------------------------------------------------------------------


@pytest.mark.clause("SELF-7", "SELF-9")
def test_a_late_answer_is_closed_answered_with_the_end_and_changes_nothing(rig: Bench) -> None:
    def answer_late(line: Line) -> None:
        line.hear()
        assert line.hear() == rig.ended
        line.say(rig.answer, rig.lent)
        line.say(rig.ended)

    liar = rig.lie(answer_late)
    with rig.obtain(service=rig.service, patience=HASTY) as handoff:
        assert handoff.settle()
        assert liar.told(0) == [rig.wanted, rig.ended]
        assert copies_of(rig.lent) == len(rig.lent)
        assert handoff.identities == rig.identities(handoff.bundle)
        handoff.end()


def test_a_real_providers_late_set_is_ended(rig: Bench) -> None:
    hook = rig.node.hook = AtAnchor()
    rig.provide()
    with rig.obtain(service=rig.service, patience=HASTY) as handoff:
        hook.may_go_on.set()
        assert handoff.settle()
        wait_until(lambda: rig.node.is_clean, "the provider's release")
        assert not rig.own.is_clean
        handoff.end()


@pytest.mark.clause("SELF-8")
def test_the_end_is_told_on_a_new_connection_when_the_old_one_is_lost(rig: Bench) -> None:
    liar = rig.lie(_hang_up)
    with rig.obtain(service=rig.service, patience=HASTY) as handoff:
        assert handoff.settle()
        assert liar.told(1) == [rig.ended]
        handoff.end()


def lie_and_die(rig: Bench) -> None:
    """Start a provider that may make a set, and is gone."""

    def die(line: Line) -> None:
        line.hear()
        liar.stop_listening()
        rig.path.unlink()
        line.hang_up()

    liar = rig.lie(die)


def _leave(handoff: Any) -> None:
    with handoff:
        pass


@pytest.mark.parametrize(
    ("tell", "redial_s"),
    [(lambda handoff: handoff.settle(), 0.02), (_leave, 0.02), (lambda h: h.close(), 60.0)],
    ids=["settling", "leaving the context", "closing"],
)
def test_an_end_that_is_owed_is_told_when_the_provider_is_back(
    rig: Bench, tell: Callable[[Any], object], redial_s: float
) -> None:
    lie_and_die(rig)
    handoff = rig.obtain(service=rig.service, patience=HASTY._replace(redial_s=redial_s))
    with closing(handoff):
        assert handoff.owes_end
        liar = rig.lie()
        tell(handoff)
        assert liar.told(0) == [rig.ended]


def test_an_end_that_is_owed_is_told_in_the_background_of_an_event_loop(plain: Bench) -> None:
    lie_and_die(plain)

    async def main() -> None:
        consumer = AsyncConsumer(
            plain.path, SimulatedInspector(), service=plain.service, patience=HASTY
        )
        async with await consumer.obtain(plain.wanted) as handoff:
            assert handoff.owes_end
            revived = plain.lie()
            while handoff.owes_end:
                await asyncio.sleep(0.002)
            assert revived.told(0) == [plain.ended]
            await handoff.end()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_an_end_that_cannot_be_told_does_not_hold_up_the_caller(rig: Bench) -> None:
    lie_and_die(rig)
    handoff = rig.obtain(service=rig.service, patience=HASTY)
    with Stopwatch() as watch:
        assert not handoff.settle(0.05)
        handoff.close()
    assert watch.seconds < 1.0


# --- The caller's end --------------------------------------------------------------------------


@pytest.mark.clause("SELF-11")
@pytest.mark.parametrize("is_own", [False, True], ids=["the provider's", "its own"])
def test_an_end_has_released_the_set_when_it_returns(rig: Bench, is_own: bool) -> None:
    node = rig.own if is_own else rig.node
    if not is_own:
        rig.provide()
    with rig.obtain(service=rig.service) as handoff:
        node.start_process(rig.wanted.allocation_id)
        assert handoff.end()
        assert handoff.is_ended
        assert node.is_clean
        assert handoff.end()


@pytest.mark.parametrize("is_own", [False, True], ids=["the provider's", "its own"])
def test_an_end_can_be_said_after_the_context_was_left(rig: Bench, is_own: bool) -> None:
    if not is_own:
        rig.provide()
    with rig.obtain(service=rig.service) as handoff:
        pass
    assert handoff.end(5.0)
    assert rig.own.is_clean
    assert rig.node.is_clean


def test_an_own_set_that_does_not_die_is_reported(
    rig: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "OWN_RELEASE_PAUSE_MAX_S", 0.005)
    with rig.obtain(service=rig.service) as handoff:
        rig.own.start_process(rig.wanted.allocation_id)
        rig.own.hang(rig.wanted.allocation_id)
        assert handoff.end()
        assert "remove the scope: 1 processes do not die" in caplog.text


def test_an_end_after_the_connection_was_lost_goes_over_a_new_one(rig: Bench) -> None:
    first = rig.provide()
    with rig.obtain(patience=HASTY) as handoff:
        first.end()
        rig.provide()
        assert not handoff.wait_ended(0.0)
        assert handoff.end(5.0)
        assert rig.node.is_clean


def test_an_end_that_is_not_confirmed_returns_in_time_and_goes_on_later(rig: Bench) -> None:
    may_confirm = threading.Event()

    def confirm_late(line: Line) -> None:
        rig.hand_over(line)
        line.hear()
        assert may_confirm.wait(10)
        line.say(rig.ended)

    rig.lie(confirm_late)
    with rig.obtain() as handoff:
        assert not handoff.end(0.02)
        may_confirm.set()
        assert handoff.end(5.0)


def test_an_end_the_provider_does_not_know_is_an_end(rig: Bench) -> None:
    def forget(line: Line) -> None:
        rig.hand_over(line)
        line.hear()
        line.say(AllocationNotFound(rig.wanted.allocation_id))

    rig.lie(forget)
    with rig.obtain() as handoff:
        assert handoff.end()


@pytest.mark.clause("WIRE-15")
def test_a_pushed_end_is_noticed(rig: Bench) -> None:
    rig.provide()
    with rig.obtain() as handoff:
        assert not handoff.wait_ended(0.0)
        rig.node.start_process(rig.wanted.allocation_id)
        rig.node.end_process(rig.wanted.allocation_id)
        assert handoff.wait_ended(5.0)
        assert handoff.end()


@pytest.mark.clause("END-15")
def test_a_push_and_an_end_may_cross(rig: Bench) -> None:
    def cross(line: Line) -> None:
        rig.hand_over(line)
        line.say(rig.ended)
        if line.hear() is not None:
            line.say(rig.ended)

    liar = rig.lie(cross)
    with rig.obtain() as handoff:
        assert handoff.end()
        assert liar.told(0) in ([rig.wanted], [rig.wanted, rig.ended])


@pytest.mark.clause("CRASH-13")
def test_losing_the_provider_is_no_end(rig: Bench) -> None:
    def hand_over_and_die(line: Line) -> None:
        rig.hand_over(line)
        line.hang_up()

    rig.lie(hand_over_and_die)
    with rig.obtain() as handoff:
        assert not handoff.wait_ended(0.05)
        assert not handoff.bundle.closed


# --- Ending what one does not hold ---------------------------------------------------------------


def test_an_allocation_can_be_ended_by_its_id_and_again(rig: Bench) -> None:
    rig.provide()
    consumer = rig.consumer()
    with consumer.obtain(rig.wanted) as handoff:
        consumer.end(rig.wanted.allocation_id)
        assert rig.node.is_clean
        assert handoff.wait_ended(5.0)
        consumer.end(rig.wanted.allocation_id)


def test_an_end_of_an_unknown_id_says_so(rig: Bench) -> None:
    rig.provide()
    with pytest.raises(AllocationNotFound, match="unknown"):
        rig.consumer().end("unknown")


@pytest.mark.parametrize("name", ["", "a/b", "\ud800", "x" * 70_000], ids=range(4))
def test_an_end_of_an_impossible_id_says_so_without_asking(rig: Bench, name: str) -> None:
    liar = rig.lie()
    with pytest.raises(AllocationNotFound):
        rig.consumer().end(name)
    assert not liar.lines


@pytest.mark.parametrize(
    ("situation", "reason"),
    [(_nothing_there, "does not exist"), (_liar(_say_nothing), "did not confirm")],
    ids=["not reached", "not confirmed"],
)
def test_an_end_by_id_that_does_not_come_about_says_so(
    rig: Bench, situation: Callable[[Path], AbstractContextManager[object]], reason: str
) -> None:
    with situation(rig.path), pytest.raises(SocketUnavailable, match=reason):
        rig.consumer(patience=HASTY).end("a", timeout_s=0.05)


def test_an_end_is_repeated_on_a_new_connection(rig: Bench) -> None:
    liar = rig.lie(_hang_up)
    rig.consumer(patience=HASTY).end("a")
    assert liar.told(1) == [AllocationEnded("a")]


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


def _obtaining(rig: Bench, inspector: Any = None, **options: Any) -> asyncio.Task[AsyncHandoff]:
    consumer = AsyncConsumer(rig.path, inspector or SimulatedInspector(), **options)
    return asyncio.create_task(consumer.obtain(rig.wanted))


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_while_connecting(plain: Bench, times: int) -> None:
    async def main() -> None:
        task = _obtaining(plain, service=plain.service, patience=Patience(connect_s=30.0))
        await asyncio.sleep(0)
        await _cancel_when(task, lambda: True, times)

    with _full_backlog(plain.path), Stopwatch() as watch:
        asyncio.run(main())
    assert watch.seconds < 1.0
    assert plain.own.is_clean


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_while_asking_the_provider_is_told(plain: Bench, times: int) -> None:
    async def main() -> None:
        task = _obtaining(plain, service=plain.service)
        await _cancel_when(task, lambda: liar.lines and liar.lines[0].heard, times)

    liar = plain.lie(_say_nothing)
    asyncio.run(main())
    assert liar.told(0) == [plain.wanted, plain.ended]


def test_cancelled_with_the_answer_unread_nothing_stays_open(plain: Bench) -> None:
    answered = threading.Event()

    def answer(line: Line) -> None:
        plain.hand_over(line)
        answered.set()

    async def main() -> None:
        task = _obtaining(plain)
        for _ in range(3):
            await asyncio.sleep(0)
        # The loop is not let near the socket any more.
        assert answered.wait(10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    liar = plain.lie(answer)
    asyncio.run(main())
    assert copies_of(plain.lent) == len(plain.lent)
    assert liar.told(0) == [plain.wanted, plain.ended]


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_during_self_service_its_set_is_released_and_the_provider_told(
    plain: Bench, times: int
) -> None:
    hook = plain.own.hook = AtAnchor()

    async def main() -> None:
        task = _obtaining(plain, service=plain.service)
        asyncio.get_running_loop().call_later(0.1, hook.may_go_on.set)
        await _cancel_when(task, hook.begun.is_set, times)

    liar = plain.lie(_hang_up)
    asyncio.run(main())
    assert plain.own.is_clean
    assert liar.told(1) == [plain.ended]


def test_cancelled_when_the_answer_is_in_hand_the_provider_is_told(plain: Bench) -> None:
    class Cancelling(SimulatedInspector):
        """Asked while the answer is being looked at, in the very turn of the loop."""

        def own(self, kind: NamespaceType) -> None:
            task.cancel()

    async def main() -> None:
        nonlocal task
        task = _obtaining(plain, Cancelling())
        with pytest.raises(asyncio.CancelledError):
            await task

    task: asyncio.Task[Any]
    liar = plain.lie(plain.hand_over)
    asyncio.run(main())
    assert copies_of(plain.lent) == len(plain.lent)
    assert liar.told(0) == [plain.wanted, plain.ended]


def test_cancelled_while_leaving_the_context_everything_is_closed(plain: Bench) -> None:
    lie_and_die(plain)

    async def main() -> None:
        handoff = await _obtaining(plain, service=plain.service)
        task = asyncio.create_task(handoff.__aexit__(None, None, None))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert handoff.bundle.closed

    asyncio.run(main())


def test_a_wait_that_is_cancelled_can_be_begun_again(plain: Bench) -> None:
    async def main() -> None:
        async with await _obtaining(plain) as handoff:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(handoff.wait_ended(), 0.01)
            plain.node.start_process(plain.wanted.allocation_id)
            plain.node.end_process(plain.wanted.allocation_id)
            await asyncio.wait_for(handoff.wait_ended(), 5.0)

    plain.provide()
    asyncio.run(main())


def test_an_interrupted_caller_tells_the_provider(plain: Bench) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def silent(line: Line) -> None:
        line.hear()
        wait_until(lambda: sys._current_frames()[caller].f_code.co_name == "_wait")
        os.kill(os.getpid(), signal.SIGUSR1)

    caller = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, interrupt)
    liar = plain.lie(silent)
    try:
        with pytest.raises(KeyboardInterrupt):
            plain.obtain()
        assert liar.told(0) == [plain.wanted, plain.ended]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_cancelled_wait_ends_and_leaves_the_allocation(plain: Bench) -> None:
    plain.provide()
    with plain.obtain() as handoff, Descriptor(os.eventfd(1)) as cancel:
        with pytest.raises(Cancelled):
            handoff.wait_ended(DEADLINE_S, cancel=cancel.fileno())
        assert not handoff.is_ended
        assert not handoff.wait_ended(0.0)


def test_a_cancelled_request_is_withdrawn(plain: Bench) -> None:
    with Descriptor(os.eventfd(0)) as cancel:

        def silent(line: Line) -> None:
            line.hear()
            os.eventfd_write(cancel.fileno(), 1)

        liar = plain.lie(silent)
        with pytest.raises(Cancelled):
            plain.consumer().obtain(plain.wanted, cancel=cancel.fileno())
        assert liar.told(0) == [plain.wanted, plain.ended]


def test_what_is_cancelled_while_the_backlog_is_full_waits_no_longer(plain: Bench) -> None:
    with Descriptor(os.eventfd(0)) as cancel, _full_backlog(plain.path):
        later = threading.Timer(0.05, os.eventfd_write, (cancel.fileno(), 1))
        later.start()
        with Stopwatch() as watch, pytest.raises(Cancelled):
            plain.consumer().obtain(plain.wanted, cancel=cancel.fileno())
        later.join()
    assert watch.seconds < Patience().answer_s


def test_self_service_that_has_begun_is_not_cancelled(plain: Bench) -> None:
    with Descriptor(os.eventfd(0)) as cancel:

        class Cancelling(SimulatedBackend):
            def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
                os.eventfd_write(cancel.fileno(), 1)
                return super().create_namespaces(request)

        with closing(Cancelling(plain.own)) as service:
            consumer = plain.consumer(service=service)
            with consumer.obtain(plain.wanted, cancel=cancel.fileno()) as handoff:
                assert handoff.is_own
                assert handoff.end()


@pytest.mark.clause("RUN-6")
def test_who_joins_an_allocation_and_gives_up_does_not_end_it(rig: Bench) -> None:
    liar = rig.lie(_say_nothing)
    with pytest.raises(SocketUnavailable, match="no whole answer"):
        rig.obtain(patience=HASTY, joins=True)
    assert liar.told(0) == [rig.wanted]


def test_a_consumer_that_joins_an_allocation_can_end_it(rig: Bench) -> None:
    provider = rig.provide()
    with rig.obtain() as first, rig.obtain(joins=True) as joined:
        assert joined.end(5.0)
        assert first.wait_ended(5.0)
    assert provider.state_of(rig.wanted.allocation_id) is AllocationState.RELEASED


# --- Many at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_own", [False, True], ids=["the provider's", "its own"])
def test_many_allocations_in_one_loop(plain: Bench, is_own: bool) -> None:
    async def one(consumer: AsyncConsumer, number: int) -> object:
        request = NamespaceRequest(f"{plain.wanted.allocation_id}-{number}", ALL)
        async with await consumer.obtain(request) as handoff:
            assert handoff.response == NamespaceResponse(request.allocation_id, ALL)
            assert handoff.is_degraded == is_own
            await handoff.end()
            return handoff.identities

    async def main() -> list[object]:
        consumer = AsyncConsumer(plain.path, SimulatedInspector(), service=plain.service)
        return await asyncio.gather(*(one(consumer, number) for number in range(100)))

    if not is_own:
        plain.provide()
    assert len(set(asyncio.run(main()))) == 100
    assert plain.node.is_clean
    assert plain.own.is_clean


def test_many_consumers_of_one_allocation_get_the_same(plain: Bench) -> None:
    async def main() -> None:
        consumer = AsyncConsumer(plain.path, SimulatedInspector())
        async with asyncio.timeout(10):
            handoffs = await asyncio.gather(*(consumer.obtain(plain.wanted) for _ in range(30)))
        assert len({handoff.identities for handoff in handoffs}) == 1
        for handoff in handoffs:
            await handoff.close()

    plain.provide()
    asyncio.run(main())


@pytest.mark.parametrize("wrong", [None, 5, b"x"])
def test_what_is_no_request_or_no_id_is_said_to_be_none(rig: Bench, wrong: Any) -> None:
    kind = type(wrong).__name__
    for asked in (rig.consumer().obtain, rig.consumer().request_namespaces):
        with pytest.raises(TypeError, match=f"^request must be NamespaceRequest, not {kind}$"):
            asked(wrong)
    with pytest.raises(TypeError, match=f"^allocation_id must be str, not {kind}$"):
        rig.consumer().end(wrong)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"x"


@pytest.mark.parametrize("path", [b"x", 5, BytesPath()], ids=["bytes", "number", "bytes path"])
@pytest.mark.parametrize("form", [Consumer, AsyncConsumer, linux.Consumer, linux.AsyncConsumer])
def test_the_path_of_a_consumer_is_text(form: Any, path: Any) -> None:
    with pytest.raises(TypeError, match=r"^path must be str, not (int|bytes)$"):
        form(path, SimulatedInspector())


def test_a_consumer_shows_its_path_so_that_it_can_be_read(rig: Bench, tmp_path: Path) -> None:
    for path, shown in (("", "''"), ("a\0b", r"'a\x00b'"), (None, "no provider")):
        rig.path = path  # type: ignore[misc, assignment]
        assert f" of {shown}, " in repr(rig.consumer())


def test_a_closed_consumer_says_so(rig: Bench) -> None:
    rig.provide()
    with rig.consumer() as consumer:
        consumer.request_namespaces(rig.wanted)
    name = rig.wanted.allocation_id
    assert repr(consumer).endswith("without self-service, closed>")
    for act in (
        lambda: consumer.obtain(rig.wanted),
        lambda: consumer.request_namespaces(rig.wanted),
        lambda: consumer.end(name),
        lambda: consumer.handoff_of(name),
    ):
        with pytest.raises(ValueError, match=r"^the consumer is closed$"):
            act()


class Closing(SimulatedInspector):
    """Closes the consumer that asks it."""

    consumer: Any

    def inspect(self, fd: int) -> Any:
        self.consumer.close()
        return super().inspect(fd)


def test_what_arrives_after_closing_from_a_callback_is_not_kept(plain: Bench) -> None:
    plain.lie(plain.hand_over)
    inspector = Closing()
    inspector.consumer = plain.consumer(inspector)
    with pytest.raises(ValueError, match=r"^the consumer is closed$"):
        inspector.consumer.request_namespaces(plain.wanted)
    assert copies_of(plain.lent) == len(plain.lent)


def test_what_arrives_after_closing_is_not_kept(plain: Bench) -> None:
    """The census would find its descriptors."""
    closed: list[Any] = []

    def hand_over_late(line: Line) -> None:
        line.hear()
        closed[0].result(DEADLINE_S)
        line.say(plain.answer, plain.lent)

    async def request_and_close() -> None:
        consumer = AsyncConsumer(plain.path, SimulatedInspector())
        asking = asyncio.create_task(consumer.request_namespaces(plain.wanted))
        await asyncio.sleep(0)
        closed.append(
            asyncio.run_coroutine_threadsafe(consumer.close(), asyncio.get_running_loop())
        )
        with pytest.raises(ValueError, match=r"^the consumer is closed$"):
            await asking

    plain.lie(hand_over_late)
    asyncio.run(request_and_close())


# --- What the caller's own code raises ---------------------------------------------------------


def fail(*_: object) -> Any:
    raise RuntimeError("the caller's own")


class Failing(SimulatedInspector):
    def inspect(self, fd: int) -> Any:
        fail()


@pytest.mark.timeout(30)
def test_an_audit_that_raises_is_not_waited_for(rig: Bench) -> None:
    """While connecting, and when the time for an answer is over."""
    for scripts in ((), (lambda line: None,)):
        if scripts:
            rig.lie(*scripts)
        with pytest.raises(RuntimeError, match="the caller's own"):
            rig.obtain(audit=fail, patience=HASTY)


@pytest.mark.timeout(30)
def test_an_inspector_that_raises_has_the_allocation_ended(rig: Bench) -> None:
    provider = rig.lie(rig.hand_over)
    with pytest.raises(RuntimeError, match="the caller's own"):
        rig.obtain(inspector=Failing())
    assert provider.told(0) == [rig.wanted, rig.ended]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("step", ["withdraw", "hurry"])
def test_what_was_raised_first_is_what_the_caller_gets(
    rig: Bench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail_again(_: object) -> None:
        raise LookupError

    rig.lie(rig.hand_over)
    monkeypatch.setattr(exchange.Exchange, step, fail_again)
    with pytest.raises(RuntimeError, match="the caller's own"):
        rig.obtain(inspector=Failing())


@pytest.mark.timeout(30)
def test_a_send_that_raises_is_not_waited_for(rig: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.lie()
    monkeypatch.setattr(exchange.Exchange, "write", fail)
    monkeypatch.setattr(exchange.Channel, "wants_write", True)
    with pytest.raises(RuntimeError, match="the caller's own"):
        rig.obtain()


@pytest.fixture
def fails_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the next look at what has arrived fail, and none after it."""
    read = exchange.Exchange.read

    def fail_once(inner: exchange.Exchange) -> None:
        monkeypatch.setattr(exchange.Exchange, "read", read)
        fail()

    return lambda: monkeypatch.setattr(exchange.Exchange, "read", fail_once)


@pytest.mark.timeout(30)
def test_a_handoff_goes_on_after_an_exception(rig: Bench, fails_once: Callable[[], None]) -> None:
    is_held = threading.Event()

    def hand_over_and_end(line: Line) -> None:
        rig.hand_over(line)
        assert is_held.wait(DEADLINE_S)
        line.say(rig.ended)

    rig.lie(hand_over_and_end)
    with rig.obtain() as handoff:
        fails_once()
        is_held.set()
        with pytest.raises(RuntimeError, match="the caller's own"):
            handoff.wait_ended(DEADLINE_S)
        assert handoff.wait_ended(DEADLINE_S)


def test_an_exception_that_nothing_awaited_is_reported(
    plain: Bench, fails_once: Callable[[], None]
) -> None:
    reported: list[Any] = []
    is_held = threading.Event()
    read = exchange.Exchange.read

    def hand_over_and_end(line: Line) -> None:
        plain.hand_over(line)
        assert is_held.wait(DEADLINE_S)
        line.say(plain.ended)

    async def obtain_and_close() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: reported.append(context["exception"]))
        handoff = await AsyncConsumer(plain.path, SimulatedInspector()).obtain(plain.wanted)
        fails_once()
        is_held.set()
        async with asyncio.timeout(DEADLINE_S):
            while exchange.Exchange.read is not read:
                await asyncio.sleep(0.01)
        await handoff.close()

    plain.lie(hand_over_and_end)
    asyncio.run(obtain_and_close())
    assert [str(error) for error in reported] == ["the caller's own"]
