"""`LinuxBackend`: make, watch and release allocations on this node (cgroup, namespaces, image).

Here is how each step of `transport.contract` is done on Linux; `linux.steps` runs them. What cannot
be undone yet is tried again by the next `release_namespaces`.

Each incarnation of an allocation has a token of its own, which no other ever has. It is in the
journal, in the anchor's environment and on the cgroup, and so shows after a crash what belongs to
which allocation. Nothing without a token of ours is touched.

A consumer that makes its own namespaces uses the same class (`LinuxBackend.for_self_service`):
without a journal, and everything ends with the consumer's process.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from statemachine.errors import AllocationNotFound, FdPassing
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.record import record
from statemachine.states import AllocationState
from transport.calls import syscall
from transport.contract import Adoption, Observation, Recovery, Sighting, Step
from transport.descriptors import Descriptor, DescriptorBundle

from .anchor import Anchor, boot_id
from .cgroups import (
    DEFAULT_PLACE,
    SELF_SERVICE_SLICE,
    Scope,
    ScopeError,
    ScopePlace,
    ScopeWatch,
    Use,
    described_scopes,
    remove_anchor_cgroup,
    remove_cgroup,
    remove_slices,
)
from .features import Features
from .forge.client import Forge
from .forge.plan import AnchorPlan, ForgeError
from .instance import (
    Instance,
    InstanceBusy,
    hold_scope,
    new_own_token,
    release_ownerless,
)
from .journal import Entry, Journal, JournalError, JournalUnavailable
from .mounts import ImageError, ImageStore
from .namespaces import expect_own_namespaces, open_bundle
from .pool import AnchorPool, NamespaceTypes
from .recovery import (
    CREATED_MARK,
    ENDED_MARK,
    HANDED_MARK,
    Action,
    Case,
    ScopeSeen,
    describe,
    find_cases,
    state_noted,
)
from .steps import StepwiseAllocation, StepwiseBackend
from .survey import states_of, zombies_below
from .syscalls import SyscallError, calling

IMAGE_ROOT: Final = Path("/var/lib/uenv")
"""Where images are looked for."""

UENV_BASE: Final = Path("/run/pact/uenv")
"""Where images appear inside an allocation."""

STATE_DIR: Final = Path("/run/pact/state")
"""Where the provider keeps its journal. Gone after a reboot, as the namespaces are."""

HOLD_TIME_S: Final = 60.0
"""How long an image stays mounted after its last user."""

FOREVER: Final = (errno.EPERM, errno.ENOSYS)
"""What a call fails with that this process may not use, and never will: no right comes back."""

DYING_PATIENCE_MS: Final = 5
"""How long the first try to end an init waits for its end."""

_log: Final = logging.getLogger(__name__)

LOOKS_MAX: Final = 16
"""At how many allocations one call of `reconcile` looks: in sum less than a millisecond."""

SURVEY_AFTER_TRIES: Final = 6
"""From which try on a living init is explained by the processes that it may wait for."""


class Overtaken(Exception):
    """The allocation ended while it was being created."""


class Kept(Exception):
    """An allocation of that id may be alive, and was kept as it was found."""


_FAILURES: Final = (
    SyscallError,
    ForgeError,
    ImageError,
    JournalError,
    InstanceBusy,
    Overtaken,
    Kept,
)
"""What a step can fail with."""


@record
class NodeSettings:
    """Where things are on this node. The defaults are the constants above."""

    cgroup2: Path | None
    """Mount point of cgroup v2; None makes no scopes, where none can be made."""
    image_root: Path = IMAGE_ROOT
    """Where images are looked for."""
    uenv_base: Path = UENV_BASE
    """Where they appear inside an allocation."""
    hold_time_s: float = HOLD_TIME_S
    """How long an image stays mounted after its last user."""
    place: ScopePlace = DEFAULT_PLACE
    """Where scopes are below `cgroup2`, and what they are called."""


@dataclass(slots=True)
class _OnLinux(StepwiseAllocation):
    """One incarnation of an allocation, and what it has on this node."""

    token: str = field(default_factory=lambda: os.urandom(16).hex())
    """Of this incarnation, and of no other ever."""
    scope: Scope | None = None
    image: Descriptor | None = None
    """The detached mount, between the step that makes it and the step that moves it."""
    ahead: Anchor | None = None
    """The anchor that was made ahead, until the step that would make one."""
    anchor: Anchor | None = None
    events: Descriptor | None = None
    """`cgroup.events`, while the allocation is watched."""
    hold: Descriptor | None = None
    """In self-service the lock of the scope, which shows that this process lives."""
    seen: Sighting | None = None
    """What was last seen of the scope."""
    tries: int = 0
    """How often the init has been killed."""


_WatchKey: TypeAlias = tuple[Literal["scope", "anchor", "again"], str]

_AGAIN: Final[_WatchKey] = ("again", "")


class LinuxBackend(StepwiseBackend[_OnLinux]):
    """
    Makes, watches and releases allocations on this node; fulfils `transport.contract.Backend`.

    Made by `for_provider` or `for_self_service`.
    """

    def __init__(
        self,
        settings: NodeSettings,
        *,
        journal: Journal | None,
        instance: Instance | None,
        features: Features,
        clock: Callable[[], float],
        on_close: Callable[[], None],
        pool: Mapping[NamespaceTypes, int] = MappingProxyType({}),
    ) -> None:
        super().__init__(
            str(settings.uenv_base),
            _FAILURES,
            has_scopes=settings.cgroup2 is not None,
            has_journal=journal is not None,
        )
        self._settings: Final = settings
        self._journal: Final = journal
        self._instance: Final = instance
        self._place: Final = threading.Lock()
        self._kept: Final[dict[str, str]] = {}
        """Of allocations that were neither adopted nor released: why."""
        anchors = None if instance is None else instance.path
        self._features: Final = features
        self._images: Final = ImageStore(settings.image_root, settings.hold_time_s, clock, features)
        self._forge: Final = Forge(cgroup=anchors, tied=journal is None, features=features)
        self._pool: Final = AnchorPool(pool, self._make_ahead, clock) if pool else None
        self._watch: Final = ScopeWatch[_WatchKey]()
        # Always readable: while it is watched, `observe` is called at once, to look at `_again`.
        with calling("eventfd(2)"):
            self._nudge: Final = Descriptor(syscall(os.eventfd, 1, os.EFD_CLOEXEC))
        self._again: Final[set[str]] = set()
        self._missed: Final[dict[str, Sighting]] = {}
        """What was seen without an event, by allocation."""
        self._to_look_at: list[str] = []
        """What of the present round of looks is left."""
        self._has_said_blind = False
        self._on_close: Final = on_close

    @classmethod
    def for_provider(
        cls,
        settings: NodeSettings,
        state_dir: Path,
        *,
        clock: Callable[[], float],
        features: Features | None = None,
        pool: Mapping[NamespaceTypes, int] = MappingProxyType({}),
    ) -> LinuxBackend:
        """
        Make a provider's backend: journaled, and its allocations outlive it.

        Args:
            settings: where things are.
            state_dir: where the journal is; made if absent, and locked.
            clock: monotonic seconds, for the hold time.
            features: what the Linux kernel can do; None finds out.
            pool: how many anchors of which kinds are made ahead, from `recover` on; needs scopes,
                because a provider that is killed leaves them in the anchors' cgroup.

        Raises:
            ValueError: too many anchors are to be made ahead, or there are no scopes.
            SyscallError: this process could not return to its own namespaces.
            JournalError: another provider has the state directory, or the journal is damaged.
            InstanceBusy: a running provider has the anchors that the journal belongs to.
            ScopeError: the anchors' cgroup cannot be made.
        """
        expect_own_namespaces()
        if pool and settings.cgroup2 is None:
            raise ValueError("anchors are only made ahead where scopes are made")
        journal = Journal(state_dir, boot_id())
        with ExitStack() as undo:
            undo.callback(journal.close)
            root = settings.cgroup2
            if root is None:
                instance = None
                _expect_own(journal)
            else:
                instance = Instance.lock(root, journal.instance, state_dir, settings.place.parent)

            def on_close() -> None:
                journal.close()
                if root is not None and instance is not None:
                    with instance, _leaving_what_cannot_be_removed():
                        remove_anchor_cgroup(root, instance.name)
                    for parent in sorted(instance.scope_parents):
                        with _leaving_what_cannot_be_removed():
                            remove_slices(root, ScopePlace(parent))

            undo.callback(on_close)
            if instance is not None:
                _compare_counts(journal, instance)
            backend = cls(
                settings,
                journal=journal,
                instance=instance,
                features=features or Features.probe(),
                clock=clock,
                on_close=on_close,
                pool=pool,
            )
            undo.pop_all()
        return backend

    @classmethod
    def for_self_service(
        cls,
        settings: NodeSettings,
        *,
        clock: Callable[[], float],
        features: Features | None = None,
    ) -> LinuxBackend:
        """
        Make a consumer's own backend: no journal, and everything ends with the consumer.

        Nothing is started or opened on the node before it is needed.
        """
        # Keeps SELF-12.
        root = settings.cgroup2

        def on_close() -> None:
            if root is not None:
                with _leaving_what_cannot_be_removed():
                    remove_slices(root, settings.place)
                    _remove_own_slice(root, settings.place)

        return cls(
            settings,
            journal=None,
            instance=None,
            features=features or Features.probe(),
            clock=clock,
            on_close=on_close,
        )

    @property
    def settings(self) -> NodeSettings:
        """Where things are."""
        return self._settings

    def start(self) -> None:
        """
        Start the process that makes anchors now, so that no request waits for it, or fails by it.

        Raises:
            ForgeError: it cannot be started, or it may not make namespaces, and never will.
        """
        # Keeps PEER-17, NODE-24.
        self._forge.ensure_started()
        try:
            self._forge.try_out()
        except ForgeError as error:
            # Of a shortage, which may pass, a request is told; what is alive is watched meanwhile.
            if error.cause.errno in FOREVER:
                raise

    # --- The steps of a creation ---------------------------------------------------------------

    def _new(self, request: NamespaceRequest) -> _OnLinux:
        if self._has_journal:
            return _OnLinux(request)
        return _OnLinux(request, token=new_own_token())

    def _perform(self, step: Step, allocation: _OnLinux) -> str | None:
        return _WORK[step](self, allocation)

    def _intend(self, allocation: _OnLinux) -> None:
        # Keeps CRASH-3.
        assert self._journal is not None
        name, token, wanted = allocation.name, allocation.token, allocation.request
        if name in self._kept:
            raise Kept(f"an earlier one may be alive: {self._kept[name]}; see `nshandoff doctor`")
        if self._pool is not None and wanted.uenv_image is None:
            allocation.ahead = self._pool.take(frozenset(wanted.namespaces))
        if allocation.ahead is not None:
            # Journaled before it is the allocation's: from then on what has the token is.
            allocation.token = token = allocation.ahead.token
        root, place = self._settings.cgroup2, self._settings.place
        # Where it will be: the settings may be others when a later provider looks for it.
        path = None if root is None else str(place.path_of(root, name))
        self._journal.intend(Entry(name, token, AllocationState.REQUESTED, wanted, scope_path=path))

    def _make_scope(self, allocation: _OnLinux) -> None:
        # Keeps NODE-2.
        root, place = self._settings.cgroup2, self._settings.place
        assert root is not None
        description = None
        if self._instance is not None:
            description = describe(self._instance.name, allocation.request)
        try:
            allocation.scope = _create_scope(root, allocation, description, place)
        except ScopeError as error:
            if error.errno != errno.EEXIST or self._has_journal:
                raise
            # The provider's own set for this allocation is there, or about to be. The consumer does
            # not wait for its end, and what the consumer starts must not be killed with it.
            allocation.scope = _create_scope(_make_own_slice(root), allocation, None, place)
        if not self._has_journal:
            try:
                allocation.hold = hold_scope(allocation.scope.path, allocation.token)
            except ScopeError:
                allocation.scope.remove()
                raise

    def _mount_image(self, allocation: _OnLinux) -> None:
        image = allocation.request.uenv_image
        assert image is not None
        allocation.image = self._images.acquire(image, allocation.token)

    def _make_anchor(self, allocation: _OnLinux) -> None:
        # Keeps NODE-6.
        self._hold_instance()  # first: if it fails, the image is still the allocation's to close
        ahead, allocation.ahead = allocation.ahead, None
        if ahead is not None:
            if ahead.is_alive():
                allocation.anchor = ahead
                return
            ahead.close()
        request = allocation.request
        image, allocation.image = allocation.image, None
        base = None if request.uenv_image is None else self._uenv_base
        path = self._response_to(request).uenv_mount_path
        scope = None if allocation.scope is None else str(allocation.scope.path)
        anchor_plan = AnchorPlan(allocation.token, request.namespaces, base, path, scope)
        allocation.anchor = self._forge.make(anchor_plan, image)

    def _make_ahead(self, types: NamespaceTypes, token: str) -> Anchor:
        return self._forge.make(AnchorPlan(token, tuple(t for t in NamespaceType if t in types)))

    def _publish(self, allocation: _OnLinux) -> None:
        assert self._journal is not None
        assert allocation.anchor is not None
        identity = allocation.anchor.identity(self._features)
        with self._guard:
            if allocation.name in self._over:
                raise Overtaken("the allocation has ended meanwhile")
            self._journal.publish(
                allocation.name,
                AllocationState.CREATED,
                mount_path=self._response_to(allocation.request).uenv_mount_path,
                anchor=identity.as_json(),
                scope_path=None if allocation.scope is None else str(allocation.scope.path),
            )
            # Within the guard, so that an end is not overwritten by it.
            if allocation.scope is not None:
                allocation.scope.mark(CREATED_MARK)

    def _mark_handed(self, allocation: _OnLinux) -> None:
        self._mark(allocation, HANDED_MARK, AllocationState.HANDED_OFF)

    def _mark_end(self, allocation: _OnLinux) -> None:
        # Keeps END-14.
        # If the release is not finished at once, that is journaled, with the reason.
        self._mark(allocation, ENDED_MARK, AllocationState.ENDED)

    def _mark(self, allocation: _OnLinux, mark: str, state: AllocationState) -> None:
        """Note a state on the scope or, if that cannot be marked, in the journal."""
        # Either alone makes it durable, and the scope takes a tenth of the time.
        if allocation.scope is not None:
            with suppress(ScopeError):  # gone: then that is its end
                allocation.scope.mark(mark)
                return
        self._note(allocation, state)

    # --- The steps of a release ----------------------------------------------------------------

    def _stop(self, allocation: _OnLinux) -> None:
        self._watch.remove(("scope", allocation.name))
        self._watch.remove(("anchor", allocation.name))
        for descriptor in (allocation.events, allocation.image):
            if descriptor is not None:
                descriptor.close()
        if allocation.ahead is not None:
            with allocation.ahead:
                allocation.ahead.kill()

    def _end_init(self, allocation: _OnLinux) -> str | None:
        anchor = allocation.anchor
        if anchor is None:
            return None
        anchor.kill()
        # An init takes a millisecond or two to die, most of it for its mounts. The first try waits
        # for that, because it nearly always saves a second one.
        if anchor.is_alive(patience_ms=0 if allocation.tries else DYING_PATIENCE_MS):
            allocation.tries += 1
            if allocation.tries < SURVEY_AFTER_TRIES:
                return f"init {anchor.pid} is being killed"
            return zombies_below(anchor.pid)
        anchor.close()
        allocation.anchor = None
        return None

    def _release_image(self, allocation: _OnLinux) -> str | None:
        # Keeps NODE-14.
        if allocation.anchor is not None:
            return "the image is mounted in the namespace of a living init"
        self._images.release(allocation.token)
        return None

    def _remove_scope(self, allocation: _OnLinux) -> str | None:
        # Keeps END-14.
        scope = allocation.scope
        if allocation.anchor is not None:
            # With the scope its mark goes, and an init that is exiting has left the anchors' cgroup
            # and is not dead: a later provider would have no proof of the end.
            self._note(allocation, AllocationState.ENDED)
        if scope is not None and not scope.remove_if_empty() and not scope.is_gone():
            scope.kill()
            if not scope.remove():
                return f"processes in {scope.path}: {states_of(scope.processes())}"
        if allocation.hold is not None:
            allocation.hold.close()
        return None

    def _forget(self, allocation: _OnLinux) -> None:
        assert self._journal is not None
        self._journal.forget(allocation.name)

    def _note(
        self, allocation: _OnLinux, state: AllocationState, *, why: str | None = None
    ) -> None:
        if self._journal is not None and allocation.is_journaled:
            self._journal.publish(allocation.name, state, why=why)

    def _note_why(self, allocation: _OnLinux) -> None:
        self._note(allocation, AllocationState.ENDED, why=allocation.why)

    # --- The rest of the contract --------------------------------------------------------------

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """
        Open the allocation's namespaces, in request order; the caller owns the bundle.

        Raises:
            AllocationNotFound: there is no such allocation.
            FdPassing: its init is dead, or no descriptor is left.
        """
        allocation = self._find(allocation_id)
        if allocation.anchor is None or allocation.is_released:
            raise AllocationNotFound(allocation_id)
        try:
            return open_bundle(allocation.anchor, allocation.request.namespaces, self._features)
        except SyscallError as error:
            raise FdPassing(str(error)) from error

    def scope_of(self, allocation_id: str) -> Path | None:
        """
        Say which cgroup an allocation's processes belong in; None where no scopes are made.

        Raises:
            AllocationNotFound: there is no such allocation.
        """
        scope = self._find(allocation_id).scope
        return None if scope is None else scope.path

    def watch(self, allocation_id: str) -> None:
        """
        Begin to observe an allocation's scope and its anchor; nothing once its release has begun.

        Raises:
            AllocationNotFound: there is no such allocation.
            ValueError: it is watched already. Nothing has changed in both cases.
        """
        allocation = self._find(allocation_id)
        if allocation.is_released:
            # What is added now would never be taken off again.
            return
        if allocation.is_watched:
            raise ValueError(f"{allocation_id} is watched already")
        allocation.is_watched = True
        try:
            self._watch_scope(allocation)
        except SyscallError:
            # It is gone already, as the next look shows; or no descriptor is left for it.
            self._call_again(allocation.name)
        if allocation.anchor is not None:
            key: _WatchKey = ("anchor", allocation.name)
            self._watch.add(key, allocation.anchor.pidfd.fileno(), ScopeWatch.DEATH)

    def fileno(self) -> int:
        """Lend the descriptor that is readable when there is something to observe."""
        return self._watch.fileno()

    def observe(self) -> list[Observation]:
        """Say what has been seen since the last call; an event only says where to read again."""
        seen: list[Observation] = []
        for kind, name in self._watch.poll():
            if kind == "anchor":
                seen.append(Observation(name, Sighting.INIT_DIED))
            else:
                names = self._take_again() if kind == "again" else [name]
                seen += [o for o in map(self._look_at_scope, names) if o is not None]
                seen += map(Observation._make, self._missed.items())
                self._missed.clear()
        return seen

    def reconcile(self) -> None:
        """
        Look at some allocations without an event; the next calls look at the others, in turn.

        Events get lost: for want of memory, or of an inotify instance of the user. What is found is
        reported by `observe`. Quick; to be called now and then, by the thread that observes.
        """
        # Keeps CRASH-20.
        if not self._to_look_at:
            self._to_look_at = list(self._allocations)
        for name in self._to_look_at[:LOOKS_MAX]:
            sighting = self._sighting_of(name)
            if sighting is not None:
                self._missed[name] = sighting
                self._nudge_observer()
        del self._to_look_at[:LOOKS_MAX]

    def _sighting_of(self, name: str) -> Sighting | None:
        """Say what may have gone unnoticed of an allocation."""
        allocation = self._allocations.get(name)
        if allocation is None or not allocation.is_watched or allocation.is_released:
            return None
        try:
            if allocation.anchor is not None and not allocation.anchor.is_alive():
                return Sighting.INIT_DIED
            # Not EMPTIED: a grace that runs already goes on.
            is_gone = allocation.scope is not None and allocation.scope.is_gone()
            return Sighting.CHANGED if is_gone else None
        except (SyscallError, ValueError):  # it is being released, or cannot be read: next time
            return None

    def is_over(self, allocation_id: str) -> bool:
        """Read whether the scope was used and is empty."""
        allocation = self._allocations.get(allocation_id)
        if allocation is None or allocation.scope is None:
            return False
        try:
            if allocation.scope.is_over():
                return True
        except ScopeError:
            self._call_again(allocation_id)
            return False
        if allocation.is_watched and allocation.events is None:
            self._call_again(allocation_id)
        return False

    def tidy(self) -> float | None:
        """Unmount the images whose hold time is over; return the seconds until the next one."""
        return self._images.tidy()

    def close(self) -> None:
        """
        Close everything that belongs to this object.

        A provider's allocations stay alive, for the next one to adopt. What self-service made
        ends here.
        """
        with ExitStack() as stack:
            stack.callback(self._on_close)
            stack.callback(self._images.close)
            stack.callback(self._forge.close)
            if self._pool is not None:
                stack.callback(self._pool.close)
            stack.callback(self._nudge.close)
            stack.callback(self._watch.close)
            with self._guard:
                for allocation in self._allocations.values():
                    held = (allocation.image, allocation.events, allocation.hold, allocation.anchor)
                    for descriptor in held:
                        if descriptor is not None:
                            stack.callback(descriptor.close)
                self._allocations.clear()

    # --- Recovering ----------------------------------------------------------------------------

    def recover(self) -> Recovery:
        """
        Find what an earlier provider left, and settle it by the table in `linux.recovery`.

        What may be alive and cannot be adopted is kept as it is, logged, and its id refused.
        """
        # Keeps CRASH-2, CRASH-3, CRASH-4, CRASH-16.
        if self._journal is None:
            return Recovery()
        name = "" if self._instance is None else self._instance.name
        cases = find_cases(self._journal.entries(), name, self._settings.cgroup2, self._features)
        self._forget_outdated(cases)
        found = {
            adoption.request.allocation_id: adoption
            for adoption in map(self._settle, cases)
            if adoption is not None
        }
        if self._settings.cgroup2 is not None:
            _sweep_ownerless(self._settings.cgroup2)
        self._start_pool()  # not before: what has no entry was released
        order = [entry.allocation_id for entry in self._journal.entries()]
        return Recovery(
            tuple(found[name] for name in order if name in found), self._journal.remembered()
        )

    def _start_pool(self) -> None:
        if self._pool is not None:
            self._pool.start()

    def _forget_outdated(self, cases: list[Case]) -> None:
        """Drop entries of which nothing is left, where a later incarnation has the name now."""
        assert self._journal is not None
        later = {case.name for case in cases if case.entry is None}
        for case in [case for case in cases if case.entry is not None and case.name in later]:
            if case.action is Action.RELEASE and case.anchor is None and case.scope is None:
                with suppress(JournalError):  # then the later one is kept
                    self._journal.forget(str(case.name))
                    cases.remove(case)

    def _settle(self, case: Case) -> Adoption | None:
        """Adopt, release or keep one case; None if nothing of it is this backend's from now on."""
        if case.action is Action.RELEASE and case.request is None and case.scope is None:
            # It has no entry either: there is nothing but its init.
            if case.anchor is not None:
                case.anchor.kill()
            _report(case, "released")
            case.close()
            return None
        why = case.row.why
        if case.action is not Action.KEEP:
            try:
                if self._enter(case):
                    return self._take_over(case)
                why = "another incarnation has its name, or nothing says what was asked for"
            except (JournalError, SyscallError) as error:
                why = str(error)
        if case.name is not None:
            self._kept.setdefault(case.name, why)
        _report(case, "kept", why)
        case.close()
        return None

    def _enter(self, case: Case) -> bool:
        """Give a case the entry that it has to have; False if that is not possible."""
        assert self._journal is not None
        if case.request is None:
            return False
        name, is_adopted = case.request.allocation_id, case.action is Action.ADOPT
        if case.entry is None:
            if self._journal.find(name) is not None:
                return False
            state = AllocationState.CREATED if is_adopted else AllocationState.ENDED
            self._journal.intend(self._entry_for(case, case.request, state))
            _report(case, "adopted" if is_adopted else "released")
        elif is_adopted and case.entry.state is AllocationState.REQUESTED:
            entry = self._entry_for(case, case.request, AllocationState.CREATED)
            self._journal.publish(
                name,
                entry.state,
                mount_path=entry.mount_path,
                anchor=entry.anchor,
                scope_path=entry.scope_path,
            )
            _report(case, "adopted")
        return True

    def _entry_for(self, case: Case, request: NamespaceRequest, state: AllocationState) -> Entry:
        anchor = None if case.anchor is None else case.anchor.identity(self._features).as_json()
        path = self._response_to(request).uenv_mount_path
        scope = None if case.scope is None else str(case.scope.path)
        return Entry(request.allocation_id, case.token, state, request, path, anchor, scope)

    def _take_over(self, case: Case) -> Adoption:
        """Rebuild an allocation that has an entry."""
        assert case.request is not None
        allocation = _OnLinux(case.request, token=case.token)
        allocation.scope, allocation.anchor = case.scope, case.anchor
        return self._adopt(
            allocation,
            _state_of(case),
            has_scope=case.scope is not None,
            has_init=case.anchor is not None,
        )

    def hold_place(self) -> list[str]:
        """
        Look whether the state directory and the anchors' cgroup are still this provider's.

        What was removed is made again. Quick; to be called now and then.

        Returns:
            What was made again, in words.

        Raises:
            JournalError: the state directory is lost, and this provider has to stop.
            InstanceBusy: another provider has the anchors now, likewise.
            ScopeError: the anchors' cgroup cannot be made again.
        """
        # Keeps CRASH-17.
        mended: list[str] = []
        if self._journal is not None and self._journal.is_lost():
            self._journal.make_again()
            mended.append(f"the journal of {len(self._journal.entries())} allocations was removed")
        if self._hold_instance():
            mended.append("the anchors' cgroup was removed")
        return mended

    def _hold_instance(self) -> bool:
        """Make the anchors' cgroup again if it was removed, which it can be while it is empty."""
        with self._place:
            if self._instance is None or not self._instance.is_lost():
                return False
            self._instance.make_again()
            return True

    def _adopt_image(self, image: str, allocation: _OnLinux) -> None:
        # If it cannot be found (deleted, replaced), this allocation has it all the same, and the
        # next one mounts it anew.
        with suppress(*_FAILURES):
            self._images.adopt(image, allocation.token)

    # --- Helpers -------------------------------------------------------------------------------

    def _watch_scope(self, allocation: _OnLinux) -> None:
        with self._guard:  # against `_end`, in another thread
            is_due = allocation.events is None and not allocation.is_released
            if allocation.scope is not None and is_due:
                self._watch_removal(allocation.name, allocation.scope)
                # Kept only once it is watched: what is kept is not tried again.
                events = allocation.scope.open_events()
                try:
                    self._watch.add(("scope", allocation.name), events.fileno())
                except BaseException:
                    events.close()
                    raise
                allocation.events = events

    def _watch_removal(self, name: str, scope: Scope) -> None:
        try:
            self._watch.add_removal(("scope", name), scope.path)
        except SyscallError as error:
            # Its emptying is noticed all the same, and its removal at the next look.
            if not self._has_said_blind:
                _log.warning("scopes that other programs remove are not noticed at once: %s", error)
            self._has_said_blind = True

    def _look_at_scope(self, name: str) -> Observation | None:
        allocation = self._allocations.get(name)
        if allocation is None or allocation.scope is None or allocation.is_released:
            return None
        before = allocation.seen
        allocation.seen = self._state_of_scope(allocation, allocation.scope)
        if name in self._over and allocation.seen is before:
            return None  # what has changed is the mark of its end
        return Observation(name, allocation.seen)

    def _state_of_scope(self, allocation: _OnLinux, scope: Scope) -> Sighting:
        try:
            use = scope.use()
            if use is Use.OVER:
                return Sighting.EMPTIED
            # What changes from now on is reported, also if it is only watched from now on.
            self._watch_scope(allocation)
            return Sighting.POPULATED if use is Use.RUNNING else Sighting.CHANGED
        except SyscallError:
            # It is there and could not be read; no descriptor is left, perhaps.
            return Sighting.CHANGED

    def _call_again(self, name: str) -> None:
        """Have `observe` called at once, to look at a scope that need not report anything."""
        self._again.add(name)
        self._nudge_observer()

    def _nudge_observer(self) -> None:
        self._watch.remove(_AGAIN)
        self._watch.add(_AGAIN, self._nudge.fileno(), ScopeWatch.DEATH)

    def _take_again(self) -> list[str]:
        names = sorted(self._again)
        self._again.clear()
        return names


_WORK: Final[Mapping[Step, Callable[[LinuxBackend, _OnLinux], str | None]]] = MappingProxyType(
    {
        Step.INTEND: LinuxBackend._intend,
        Step.SCOPE: LinuxBackend._make_scope,
        Step.IMAGE: LinuxBackend._mount_image,
        Step.ANCHOR: LinuxBackend._make_anchor,
        Step.PUBLISH: LinuxBackend._publish,
        Step.RECORD_HANDOFF: LinuxBackend._mark_handed,
        Step.RECORD_END: LinuxBackend._mark_end,
        Step.END_INIT: LinuxBackend._end_init,
        Step.RELEASE_IMAGE: LinuxBackend._release_image,
        Step.REMOVE_SCOPE: LinuxBackend._remove_scope,
        Step.FORGET: LinuxBackend._forget,
    }
)
"""How each step is done."""


def _expect_own(journal: Journal) -> None:
    """Refuse a copied journal where there is no anchors' cgroup to lock."""
    if journal.is_copy and journal.entries():
        advice = (
            "it was written beside another lock file, so it is a copy or was moved, and without"
            " cgroups nothing shows whether a provider uses the original; use that one, or remove"
            " this one"
        )
        raise JournalUnavailable(journal.path, advice)


def _compare_counts(journal: Journal, instance: Instance) -> None:
    """Notice a journal that has lost changes: it was damaged, emptied, or is an older copy."""
    # Keeps CRASH-18.
    noted, has = instance.changes(), journal.changes
    if noted > has:
        _warn(
            "journal_incomplete",
            f"{journal.path}: it has {has} of {noted} changes; what it has lost is looked for on"
            " the node",
        )
    journal.count_from(noted)
    journal.on_change = instance.note_changes


def _state_of(case: Case) -> AllocationState:
    """Say with which state an allocation is taken over."""
    if case.action is Action.ADOPT:
        is_handed = _noted(case) is AllocationState.HANDED_OFF
        return AllocationState.HANDED_OFF if is_handed else AllocationState.CREATED
    if case.entry is None or case.seen is ScopeSeen.ENDED:
        return AllocationState.ENDED
    return case.entry.state


def _noted(case: Case) -> AllocationState | None:
    if case.entry is not None:
        return state_noted(case.entry, case.scope)
    is_marked = case.scope is not None and case.scope.marked() == HANDED_MARK
    return AllocationState.HANDED_OFF if is_marked else None


def _report(case: Case, what: str, why: str | None = None) -> None:
    """Log what the journal did not know, or what cannot be decided."""
    fields = {"allocation_id": case.name, "init": case.anchor and case.anchor.pid}
    _warn(
        f"{what}_unnamed" if case.entry is None else what,
        why or case.row.why,
        verdict=case.row.verdict.value,
        **fields,
    )


def _warn(event: str, text: str, **fields: object) -> None:
    known = {name: value for name, value in fields.items() if value is not None}
    _log.warning("%s", text, extra={"event": event, "fields": known})


def _create_scope(
    root: Path, allocation: _OnLinux, description: str | None, place: ScopePlace
) -> Scope:
    """Create an allocation's scope, if need be in place of one whose consumer is dead."""
    create = partial(Scope.create, root, allocation.name, allocation.token, description, place)
    try:
        return create()
    except ScopeError as error:
        path = place.path_of(root, allocation.name)
        if error.errno != errno.EEXIST or not release_ownerless(path):
            raise
        return create()


def _sweep_ownerless(root: Path) -> None:
    """Release what is left of self-service whose consumers are dead."""
    for above in (root, root / SELF_SERVICE_SLICE):
        with _leaving_what_cannot_be_removed():
            for path, owner, _ in described_scopes(above):
                with _leaving_what_cannot_be_removed():
                    if release_ownerless(path):
                        _warn("released_ownerless", f"{path}: its consumer was dead", owner=owner)
    with _leaving_what_cannot_be_removed():
        _remove_own_slice(root, DEFAULT_PLACE)


def _make_own_slice(root: Path) -> Path:
    path = root / SELF_SERVICE_SLICE
    with calling("mkdir(2)", path):
        syscall(path.mkdir, exist_ok=True)
    return path


@contextmanager
def _leaving_what_cannot_be_removed() -> Iterator[None]:
    """
    Log that a cgroup which is not in use could not be removed.

    It is tried again when its name is wanted, and by what starts or closes next.
    """
    try:
        yield
    except SyscallError as error:
        _log.warning("a cgroup that is not in use stays: %s", error)


def _remove_own_slice(root: Path, place: ScopePlace) -> None:
    path = root / SELF_SERVICE_SLICE
    with calling("stat(2)", path):
        is_there = syscall(path.is_dir)
    if is_there:
        remove_slices(path, place)
        with suppress(OSError):
            remove_cgroup(path)
