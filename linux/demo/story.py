"""Two allocations that share an image, from request to release: the plot of the demonstration.

Who plays is in `cast`, what is claimed on the way in `claims`. Every step is followed by
its claims, so that what is said is what has just been so.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from statemachine.errors import CreationFailed, NamespaceError
from statemachine.messages import NamespaceRequest, NamespaceType
from transport.descriptors import NamespaceIdentity
from transport.request import Consumer, Patience

from .. import syscalls
from ..backend import LinuxBackend, NodeSettings, instance_of
from ..cgroups import ANCHOR_SLICE, remove_anchor_cgroup, remove_slices
from . import claims
from .cast import CastError, Company, LinuxCompany, Part, SimulatedCompany
from .census import Traces
from .report import Report
from .stage import IMAGE, Stage

ANSWER_TIMEOUT_S: Final = 5.0
"""How long the provider may take for an answer, or until a state is reached."""

CLEANUP_TIMEOUT_S: Final = 3.0
"""How long it may take to confirm an end that nobody watches any more."""

LIFE: Final = ["requested", "created", "handed_off", "ended", "released"]
"""What the provider must tell of each allocation, each once and in this order."""

_PID, _NET, _MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT


class Story:
    """
    The story, to be told once and then closed.

    Args:
        stage: What can be shown.
        report: What is said and checked.
        clock: Monotonic seconds; used to say how long something took, and for nothing else.
    """

    def __init__(self, stage: Stage, report: Report, clock: Callable[[], float]) -> None:
        self._stage: Final = stage
        self._report: Final = report
        self._clock: Final = clock
        self._first: Final = self._part("first", (_PID, _NET, _MOUNT))
        self._second: Final = self._part("second", (_MOUNT, _PID, _NET))
        self._parts: Final = (self._first, self._second)
        self._company: Company | None = None
        self._identities: set[NamespaceIdentity] = set()

    def tell(self) -> None:
        """
        Tell it from the beginning to the end.

        Raises:
            StageError: no provider can serve here.
            CastError: somebody did not play their part.
            NamespaceError: the provider refused, or could not be understood.
        """
        self._open()
        self._ask()
        self._look_from_outside()
        if not self._stage.is_simulated:
            self._look_from_inside()
        self._ask_again()
        self._end_first()
        self._end_second()
        self._look_at_lives()
        self._stop()

    def close(self) -> None:
        """
        End whatever is still there; harmless after a story that was told to its end.

        The allocations are ended by word while the provider runs. What it could not release, or
        did not live to, is then released from its journal.
        """
        for part in self._parts:
            part.close()
        if self._company is None:
            return
        for part in self._parts:
            is_over = "released" in self._report.lifecycles.get(part.subject, ())
            if self._company.is_running and not is_over:
                with suppress(NamespaceError, OSError):  # then the sweep has it
                    self._consumer().end(part.name, CLEANUP_TIMEOUT_S)
        self._company.stop()
        if not self._stage.is_simulated:
            _sweep(self._stage, self._clock)

    def traces(self) -> Traces:
        """Say what on this machine would be ours."""
        if self._stage.is_simulated:
            return Traces(self._stage.folder)
        scopes = tuple(part.scope for part in self._parts if part.scope is not None)
        if self._stage.cgroup2 is not None:
            instance = f"{instance_of(self._stage.state_dir)}.scope"
            scopes += (self._stage.cgroup2 / ANCHOR_SLICE / instance,)
        return Traces(self._stage.folder, scopes, frozenset(self._identities))

    # --- Chapters ------------------------------------------------------------------------------

    def _open(self) -> None:
        stage = self._stage
        for what, why in stage.missing.items():
            self._report.absent(what, why)
        if stage.cgroup2 is not None:
            self._report.fact("cgroup2", str(stage.cgroup2))
        if stage.image is not None and not stage.is_simulated:
            size = (stage.image_root / IMAGE).stat().st_size
            self._report.fact("image", f"{IMAGE}: squashfs, {size} bytes")
        self._company = SimulatedCompany(stage) if stage.is_simulated else LinuxCompany(stage)
        self._report.fact("provider", self._company.description)
        self._report.fact("socket", str(stage.socket))

    def _ask(self) -> None:
        image = "" if self._stage.image is None else f", both with {self._stage.image}"
        wishes = "; ".join(f"{part.subject} wants {part.types()}" for part in self._parts)
        self._report.section("ASK", f"{wishes}{image}")
        for part in self._parts:
            part.handoff = self._consumer().obtain(part.request)
            self._identities |= set(part.handoff.identities)
            self._await_state(part, "handed_off")

    def _look_from_outside(self) -> None:
        self._report.section("OUTSIDE", "the descriptors that came, and what they say they are")
        inspector = self._on_stage.inspector
        for part in self._parts:
            claims.claim_types(self._report, part, inspector)
        claims.claim_distinct(self._report, self._parts, inspector)
        if not self._stage.is_simulated:
            claims.claim_mounts(self._report, self._stage)

    def _look_from_inside(self) -> None:
        self._report.section("INSIDE", "a process that was started in the first one's namespaces")
        for part in self._parts:
            part.settle()
        claims.claim_place(self._report, self._first)
        claims.claim_init(self._report, self._first)
        seen = self._first.settled.ask("look")
        claims.claim_sight(self._report, seen)
        claims.claim_apart(self._report, seen, self._second.settled.ask("look"))

    def _ask_again(self) -> None:
        self._report.section("AGAIN", "both are alive, and are asked for once more")
        for part in self._parts:
            with self._consumer().obtain(part.request) as again:
                claims.claim_same(self._report, part, again.identities)
        found = "namespaces"
        try:
            self._consumer().obtain(NamespaceRequest(self._first.name, (_NET,))).close()
        except CreationFailed as error:
            found = type(error).__name__
        claim = "first: another request in its name is refused"
        self._report.check("first.conflict", claim, "CreationFailed", found)

    def _end_first(self) -> None:
        part = self._first
        has_scope = self._stage.is_simulated or part.scope is not None
        why = "when its cgroup is empty" if has_scope else "when its init is killed"
        self._report.section("END", f"the first {why}, the second when its consumer says so")
        if has_scope:
            self._leave(part)
        else:
            self._kill_init(part)
        began_s = self._clock()
        is_ended = part.held.wait_ended(ANSWER_TIMEOUT_S)
        passed_ms = (self._clock() - began_s) * 1000
        self._await_state(part, "released")
        claim = "first: its consumer is told, AllocationEnded"
        self._report.check("first.ended", claim, True, is_ended, f"after {passed_ms:.1f} ms")

    def _end_second(self) -> None:
        part, report = self._second, self._report
        # Said, and not waited for: the init cannot go before we have reaped our child in there.
        part.held.end(0.0)
        status = None if part.resident is None else part.resident.wait()
        is_ended = part.held.end(ANSWER_TIMEOUT_S)
        self._await_state(part, "released")
        claim = "second: the provider confirms, AllocationEnded"
        report.check("second.ended", claim, True, is_ended, "confirmed")
        if not self._stage.is_simulated:
            claim = "second: what still ran in it was killed"
            report.check("second.killed", claim, -signal.SIGKILL, status, "SIGKILL")
            claims.claim_dead(report, part)

    def _look_at_lives(self) -> None:
        for part in self._parts:
            states = self._report.lifecycles[part.subject]
            claim = f"{part.subject}: the whole life, each state once"
            evidence = f"{len(states)} states"
            self._report.check(f"{part.subject}.life", claim, LIFE, states, evidence)

    def _stop(self) -> None:
        for part in self._parts:
            part.close()
        if not self._stage.is_simulated:
            claims.claim_freed(self._report, self._parts, self._stage)
        status = self._on_stage.stop()
        claim = "the provider stops when it is told to"
        self._report.check("stopped", claim, 0, status, f"exit status {status}")

    # --- Small things --------------------------------------------------------------------------

    @property
    def _on_stage(self) -> Company:
        assert self._company is not None, "the provider comes first"
        return self._company

    def _part(self, subject: str, kinds: tuple[NamespaceType, ...]) -> Part:
        name = f"{self._stage.folder.name}-{subject}"
        return Part(subject, NamespaceRequest(name, kinds, self._stage.image), self._stage.cgroup2)

    def _consumer(self) -> Consumer:
        patience = Patience(answer_s=ANSWER_TIMEOUT_S)
        return Consumer(self._stage.socket, self._on_stage.inspector, patience=patience)

    def _await_state(self, part: Part, state: str) -> None:
        """Follow what the provider tells until an allocation has reached a state."""
        subjects = {each.name: each.subject for each in self._parts}
        while state not in self._report.lifecycles.get(part.subject, ()):
            told = self._on_stage.next_state(ANSWER_TIMEOUT_S)
            if told is None:
                raise CastError(f"the provider does not tell that {part.subject} is {state}")
            self._report.stage(subjects[told[0]], told[1])

    def _leave(self, part: Part) -> None:
        """Let the last process of an allocation exit."""
        company = self._on_stage
        if isinstance(company, SimulatedCompany):
            company.node.start_process(part.name)
            company.node.end_process(part.name)
        else:
            part.settled.leave()
            part.settled.wait()

    def _kill_init(self, part: Part) -> None:
        with syscalls.pidfd_open(claims.init_of(part.held.bundle[_PID])) as pidfd:
            syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
        part.settled.wait()


def _sweep(stage: Stage, clock: Callable[[], float]) -> None:
    """Release what a provider has left behind, as the next provider would."""
    if not stage.state_dir.exists():
        return
    settings = NodeSettings(stage.cgroup2, stage.image_root, stage.uenv_base, 0.0)
    backend = LinuxBackend.for_provider(settings, stage.state_dir, clock=clock)
    try:
        names = [adoption.request.allocation_id for adoption in backend.recover().adoptions]
        claims.settled(lambda: [name for name in names if _is_left(backend, name)])
    finally:
        backend.close()
    root = stage.cgroup2
    if root is not None:
        # The dead provider's forge is in there until it has noticed that its owner is gone.
        instance = instance_of(stage.state_dir)
        claims.settled(lambda: not remove_anchor_cgroup(root, instance))
        remove_slices(root)


def _is_left(backend: LinuxBackend, name: str) -> bool:
    with suppress(NamespaceError):
        backend.release_namespaces(name)
    return backend.why_alive(name) is not None
