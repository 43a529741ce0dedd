"""What happens in the demonstration: two allocations that share an image, from request to release.

The processes are in `processes`, what is checked on the way in `claims`. Every action is followed
by its checks, so that they show what it has just brought about.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from statemachine.errors import CreationFailed, NamespaceError
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.states import AllocationState
from transport.descriptors import NamespaceIdentity
from transport.request import Consumer, Patience

from .. import syscalls
from ..backend import LinuxBackend, NodeSettings
from ..cgroups import ANCHOR_SLICE, remove_anchor_cgroup, remove_slices
from ..instance import instance_of
from . import claims
from .census import Traces
from .host import IMAGE, Host
from .processes import DemoAllocation, DemoError, ProviderProcess, ProviderThread, RunningProvider
from .report import Report

ANSWER_TIMEOUT_S: Final = 60.0
"""How long the provider may take to answer, or to bring an allocation into a state."""

CLEANUP_TIMEOUT_S: Final = 30.0
"""How long it may take to confirm an end during the clean-up."""

STATES: Final = [state.value for state in AllocationState if state is not AllocationState.UNKNOWN]
"""What each allocation must go through, in this order."""

_PID, _NET, _MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT


class Demonstration:
    """
    The whole of it, to be run once and then closed.

    Args:
        host: Where it runs.
        report: Where results go.
        clock: Monotonic seconds, to say how long something took.
    """

    def __init__(self, host: Host, report: Report, clock: Callable[[], float]) -> None:
        self._host: Final = host
        self._report: Final = report
        self._clock: Final = clock
        self._first: Final = self._allocation("first", (_PID, _NET, _MOUNT))
        self._second: Final = self._allocation("second", (_MOUNT, _PID, _NET))
        self._allocations: Final = (self._first, self._second)
        self._provider: RunningProvider | None = None
        self._identities: set[NamespaceIdentity] = set()

    def run(self) -> None:
        """
        Run it from the beginning to the end.

        Raises:
            CannotShow: no provider can serve here.
            DemoError: a process is gone, or does not answer.
            NamespaceError: the provider refused, or could not be understood.
        """
        self._open()
        self._ask()
        self._look_from_outside()
        if not self._host.is_simulated:
            self._look_from_inside()
        self._ask_again()
        self._end_first()
        self._end_second()
        self._look_at_lives()
        self._stop()

    def close(self) -> None:
        """
        End what is still there. Idempotent.

        While the provider runs it is told to end the allocations. What it could not release is then
        released from its journal.
        """
        for allocation in self._allocations:
            allocation.close()
        if self._provider is None:
            return
        for allocation in self._allocations:
            is_over = "released" in self._report.lifecycles.get(allocation.subject, ())
            if self._provider.is_running and not is_over:
                with suppress(NamespaceError, OSError):  # then it is swept
                    self._consumer().end(allocation.name, CLEANUP_TIMEOUT_S)
        self._provider.stop()
        if not self._host.is_simulated:
            _sweep(self._host, self._clock)

    def traces(self) -> Traces:
        """Say what on this machine would be the demonstration's."""
        if self._host.is_simulated:
            return Traces(self._host.folder)
        scopes = tuple(each.scope for each in self._allocations if each.scope is not None)
        if self._host.cgroup2 is not None:
            instance = f"{instance_of(self._host.state_dir)}.scope"
            scopes += (self._host.cgroup2 / ANCHOR_SLICE / instance,)
        return Traces(self._host.folder, scopes, frozenset(self._identities))

    # --- Sections ------------------------------------------------------------------------------

    def _open(self) -> None:
        host = self._host
        for what, why in host.missing.items():
            self._report.absent(what, why)
        if host.cgroup2 is not None:
            self._report.fact("cgroup2", str(host.cgroup2))
        if host.image is not None and not host.is_simulated:
            size = (host.image_root / IMAGE).stat().st_size
            self._report.fact("image", f"{IMAGE}: squashfs, {size} bytes")
        self._provider = ProviderThread(host) if host.is_simulated else ProviderProcess(host)
        self._report.fact("provider", self._provider.description)
        self._report.fact("socket", str(host.socket))

    def _ask(self) -> None:
        image = "" if self._host.image is None else f", both with {self._host.image}"
        requests = "; ".join(f"{each.subject} wants {each.types()}" for each in self._allocations)
        self._report.section("ASK", f"{requests}{image}")
        for allocation in self._allocations:
            allocation.handoff = self._consumer().obtain(allocation.request)
            self._identities |= set(allocation.handoff.identities)
            self._await_state(allocation, "handed_off")

    def _look_from_outside(self) -> None:
        self._report.section("OUTSIDE", "the descriptors that came, and what they say they are")
        inspector = self._running.inspector
        for allocation in self._allocations:
            claims.claim_types(self._report, allocation, inspector)
        claims.claim_distinct(self._report, self._allocations, inspector)
        if not self._host.is_simulated:
            claims.claim_mounts(self._report, self._host)

    def _look_from_inside(self) -> None:
        self._report.section("INSIDE", "a process that was started in the first one's namespaces")
        for allocation in self._allocations:
            allocation.start_inner()
        claims.claim_place(self._report, self._first)
        claims.claim_init(self._report, self._first)
        seen = self._first.inner.ask("look")
        claims.claim_sight(self._report, seen)
        claims.claim_apart(self._report, seen, self._second.inner.ask("look"))

    def _ask_again(self) -> None:
        self._report.section("AGAIN", "both are alive, and are asked for once more")
        for allocation in self._allocations:
            with self._consumer().obtain(allocation.request) as again:
                claims.claim_same(self._report, allocation, again.identities)
        found = "namespaces"
        try:
            self._consumer().obtain(NamespaceRequest(self._first.name, (_NET,))).close()
        except CreationFailed as error:
            found = type(error).__name__
        claim = "first: another request in its name is refused"
        self._report.check("first.conflict", claim, "CreationFailed", found)

    def _end_first(self) -> None:
        allocation = self._first
        has_scope = self._host.is_simulated or allocation.scope is not None
        why = "when its cgroup is empty" if has_scope else "when its init is killed"
        self._report.section("END", f"the first {why}, the second when its consumer says so")
        if has_scope:
            self._leave(allocation)
        else:
            self._kill_init(allocation)
        began_s = self._clock()
        is_ended = allocation.held.wait_ended(ANSWER_TIMEOUT_S)
        passed_ms = (self._clock() - began_s) * 1000
        self._await_state(allocation, "released")
        claim = "first: its consumer is told, AllocationEnded"
        self._report.check("first.ended", claim, True, is_ended, f"after {passed_ms:.1f} ms")

    def _end_second(self) -> None:
        allocation, report = self._second, self._report
        # Not waited for: the init cannot end before we have reaped our child in its namespace.
        allocation.held.end(0.0)
        status = None if allocation.process is None else allocation.process.wait()
        is_ended = allocation.held.end(ANSWER_TIMEOUT_S)
        self._await_state(allocation, "released")
        claim = "second: the provider confirms, AllocationEnded"
        report.check("second.ended", claim, True, is_ended, "confirmed")
        if not self._host.is_simulated:
            claim = "second: what still ran in it was killed"
            report.check("second.killed", claim, -signal.SIGKILL, status, "SIGKILL")
            claims.claim_dead(report, allocation)

    def _look_at_lives(self) -> None:
        for allocation in self._allocations:
            states = self._report.lifecycles[allocation.subject]
            claim = f"{allocation.subject}: the whole life, each state once"
            evidence = f"{len(states)} states"
            self._report.check(f"{allocation.subject}.life", claim, STATES, states, evidence)

    def _stop(self) -> None:
        for allocation in self._allocations:
            allocation.close()
        if not self._host.is_simulated:
            claims.claim_freed(self._report, self._allocations, self._host)
        status = self._running.stop()
        claim = "the provider stops when it is told to"
        self._report.check("stopped", claim, 0, status, f"exit status {status}")

    # --- Helpers -------------------------------------------------------------------------------

    @property
    def _running(self) -> RunningProvider:
        assert self._provider is not None, "the provider is started first"
        return self._provider

    def _allocation(self, subject: str, kinds: tuple[NamespaceType, ...]) -> DemoAllocation:
        name = f"{self._host.folder.name}-{subject}"
        return DemoAllocation(
            subject,
            NamespaceRequest(name, kinds, self._host.image),
            self._host.cgroup2,
        )

    def _consumer(self) -> Consumer:
        patience = Patience(answer_s=ANSWER_TIMEOUT_S)
        return Consumer(self._host.socket, self._running.inspector, patience=patience)

    def _await_state(self, allocation: DemoAllocation, state: str) -> None:
        """Follow the provider's reports until an allocation has reached a state."""
        subjects = {each.name: each.subject for each in self._allocations}
        while state not in self._report.lifecycles.get(allocation.subject, ()):
            reached = self._running.next_state(ANSWER_TIMEOUT_S)
            if reached is None:
                raise DemoError(f"the provider does not report {allocation.subject} as {state}")
            self._report.state(subjects[reached[0]], reached[1])

    def _leave(self, allocation: DemoAllocation) -> None:
        """Let the last process of an allocation exit."""
        provider = self._running
        if isinstance(provider, ProviderThread):
            provider.node.start_process(allocation.name)
            provider.node.end_process(allocation.name)
        else:
            allocation.inner.leave()
            allocation.inner.wait()

    def _kill_init(self, allocation: DemoAllocation) -> None:
        with syscalls.pidfd_open(claims.init_of(allocation.held.bundle[_PID])) as pidfd:
            syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
        allocation.inner.wait()


def _sweep(host: Host, clock: Callable[[], float]) -> None:
    """Release what a provider has left, as the next provider would."""
    if not host.state_dir.exists():
        return
    settings = NodeSettings(host.cgroup2, host.image_root, host.uenv_base, 0.0)
    backend = LinuxBackend.for_provider(settings, host.state_dir, clock=clock)
    try:
        names = [adoption.request.allocation_id for adoption in backend.recover().adoptions]
        claims.settled(lambda: [name for name in names if _is_left(backend, name)])
    finally:
        backend.close()
    root = host.cgroup2
    if root is not None:
        # The dead provider's forge is in it until it has noticed that its owner is gone.
        instance = instance_of(host.state_dir)
        claims.settled(lambda: not remove_anchor_cgroup(root, instance))
        remove_slices(root)


def _is_left(backend: LinuxBackend, name: str) -> bool:
    with suppress(NamespaceError):
        backend.release_namespaces(name)
    return backend.why_alive(name) is not None
