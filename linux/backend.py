"""`LinuxBackend`: an allocation on a real node, made step by step and undone step by step.

What an allocation needs is a plan: a tuple of steps, decided before anything is done. Each step
that was done leaves behind how to undo it. Releasing is trying to undo whatever is left, as often
as it takes: a step that cannot be undone yet says why, and the others go on.

Intent is journaled before the first step, the result is published after the last one. What a
crashed provider leaves is recognised by a token that no two incarnations share: it stands in the
journal, in the anchor's environment, and on the cgroup. What does not carry our token is not ours.

The same class serves a consumer that makes its own namespaces (`LinuxBackend.for_self_service`):
the same steps, no journal, and everything ends with the consumer's process.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing
from statemachine.messages import (
    NamespaceRequest,
    NamespaceResponse,
    mount_path_below,
    objection,
)
from transport.calls import syscall
from transport.contract import Adoption, Observation, Recovery, Sighting, Standing
from transport.descriptors import Descriptor, DescriptorBundle

from .anchor import Anchor, AnchorIdentity, adopt, boot_id, find_anchors
from .cgroups import (
    Scope,
    ScopeError,
    ScopeWatch,
    anchor_cgroup,
    remove_anchor_cgroup,
    remove_slices,
)
from .features import Features
from .forge import Forge
from .forge_plan import AnchorPlan, ForgeError
from .journal import Entry, Journal, JournalError, State
from .mounts import ImageError, ImageStore
from .namespaces import open_bundle
from .survey import states_of, zombies_below
from .syscalls import SyscallError, calling

IMAGE_ROOT: Final = Path("/var/lib/uenv")
"""Where images are looked for."""

UENV_BASE: Final = Path("/run/pact/uenv")
"""Where images appear inside an allocation."""

STATE_DIR: Final = Path("/run/pact/state")
"""Where the provider keeps its journal. Of the same life as the namespaces: gone after a reboot."""

HOLD_TIME_S: Final = 60.0
"""How long an image stays mounted after its last user."""

SELF_SERVICE_SLICE: Final = "self-service.slice"
"""Mirrors the cgroup layout for a consumer whose scope's name is taken by the provider's set."""

DYING_PATIENCE_MS: Final = 5
"""How long the first try to end an init looks on while it dies."""

SURVEY_AFTER_TRIES: Final = 6
"""From which try to end an init on to ask who keeps it: before, it has not had time to die."""

_log: Final = logging.getLogger(__name__)


class Overtaken(Exception):
    """The allocation ended while it was being created."""


Failure: TypeAlias = SyscallError | ForgeError | ImageError | JournalError | Overtaken
"""What a step can fail with; what fails on this node names its call, errno and path."""

_FAILURES: Final = (SyscallError, ForgeError, ImageError, JournalError, Overtaken)


@dataclass(frozen=True, slots=True)
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


class Undo(NamedTuple):
    """How to undo one step, tried until it says None; else it says what is in its way."""

    step: str
    """The step that was done."""
    attempt: Callable[[], str | None]
    """Tries to undo it; says what stands in the way, or None."""


@dataclass(slots=True)
class _Life:
    """One allocation on this node."""

    request: NamespaceRequest
    token: str
    """Of this incarnation, and of no other ever."""
    scope: Scope | None = None
    image: Descriptor | None = None
    """The detached mount, between the step that makes it and the step that moves it."""
    anchor: Anchor | None = None
    events: Descriptor | None = None
    """`cgroup.events`, while the allocation is watched."""
    is_watched: bool = False
    is_journaled: bool = False
    """Whether the journal has an entry that says so."""
    undo: list[Undo] = field(default_factory=list)
    tries: int = 0
    """How often the init has been killed."""
    is_released: bool = False
    """Whether the end is journaled and undoing has begun."""
    why: str | None = None
    """What the last try to undo found in its way."""

    @property
    def name(self) -> str:
        return self.request.allocation_id


class Step(NamedTuple):
    """One step of a plan: what it is called in errors, and how it is done."""

    name: str
    """For texts."""
    act: Callable[[LinuxBackend, _Life], None]
    """Does it."""


_WatchKey: TypeAlias = tuple[Literal["scope", "anchor", "again"], str]

_AGAIN: Final[_WatchKey] = ("again", "")


class LinuxBackend:
    """
    Makes, watches and releases allocations on this node; fulfils `transport.contract.Backend`.

    Made by `for_provider` or `for_self_service`.
    """

    def __init__(
        self,
        settings: NodeSettings,
        *,
        journal: Journal | None,
        anchors: Path | None,
        features: Features,
        clock: Callable[[], float],
        on_close: Callable[[], None],
    ) -> None:
        self._settings: Final = settings
        self._journal: Final = journal
        self._anchors: Final = anchors
        self._features: Final = features
        self._images: Final = ImageStore(settings.image_root, settings.hold_time_s, clock, features)
        self._forge: Final = Forge(cgroup=anchors, tied=journal is None, features=features)
        self._watch: Final = ScopeWatch[_WatchKey]()
        # Always readable. To watch it is to be called again at once, for what is in `_again`.
        with calling("eventfd(2)"):
            self._nudge: Final = Descriptor(syscall(os.eventfd, 1, os.EFD_CLOEXEC))
        self._again: Final[set[str]] = set()
        self._guard: Final = threading.Lock()
        self._over: Final[set[str]] = set()
        """Allocations that have ended and are not released."""
        self._lives: Final[dict[str, _Life]] = {}
        self._on_close: Final = on_close

    @classmethod
    def for_provider(
        cls,
        settings: NodeSettings,
        state_dir: Path,
        *,
        clock: Callable[[], float],
        features: Features | None = None,
    ) -> LinuxBackend:
        """
        Make a provider's backend: journaled, and its allocations outlive it.

        Args:
            settings: where things are.
            state_dir: where the journal is; made if absent, and locked.
            clock: monotonic seconds, for the hold time.
            features: what the Linux kernel can do; None finds out.

        Raises:
            JournalError: another provider has the state directory, or the journal is damaged.
            ScopeError: the anchors' cgroup cannot be made.
        """
        journal = Journal(state_dir, boot_id())
        with ExitStack() as undo:
            undo.callback(journal.close)
            instance = instance_of(state_dir)
            root = settings.cgroup2

            def on_close() -> None:
                journal.close()
                if root is not None:
                    remove_anchor_cgroup(root, instance)
                    remove_slices(root)

            anchors = None if root is None else anchor_cgroup(root, instance)
            undo.callback(on_close)
            backend = cls(
                settings,
                journal=journal,
                anchors=anchors,
                features=features or Features.probe(),
                clock=clock,
                on_close=on_close,
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
                remove_slices(root)
                _remove_mirror(root)

        return cls(
            settings,
            journal=None,
            anchors=None,
            features=features or Features.probe(),
            clock=clock,
            on_close=on_close,
        )

    @property
    def settings(self) -> NodeSettings:
        """Where things are."""
        return self._settings

    # --- The seed's two ------------------------------------------------------------------------

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        Make an allocation: scope, image, anchor with namespaces.

        Raises:
            CreationFailed: a step failed; the reason names it, with call, errno and path. The
                steps before it are undone; what cannot go at once is in `why_alive`, and
                `release_namespaces` goes on with it.
        """
        # Keeps LIFE-8.
        reason = objection(request)
        if reason is not None:
            raise CreationFailed(reason)
        life = _Life(request, uuid.uuid4().hex)
        self._begin(life)
        for step in (_INTEND, *plan(request, has_scopes=self._has_scopes), _PUBLISH):
            try:
                step.act(self, life)
            except _FAILURES as error:
                self._abandon(life)
                raise CreationFailed(f"{step.name}: {error}") from error
        return self._response_to(request)

    def release_namespaces(self, allocation_id: str) -> None:
        """
        Try once to release an allocation; never waits.

        Raises:
            AllocationNotFound: there is none, or nothing is left of it.
        """
        # Keeps END-8, END-10.
        life = self._lives.get(allocation_id)
        if life is None:
            with self._guard:  # it failed by itself, and ended after that
                self._over.discard(allocation_id)
            raise AllocationNotFound(allocation_id)
        self._end(life)
        life.why = _attempt(life.undo)
        try:
            if life.undo:
                self._note(life, "ended", why=life.why)
            else:
                self._strike_out(life)
        except JournalError as error:
            life.why = life.why or f"strike it out of the journal: {error}"

    # --- The rest of the contract --------------------------------------------------------------

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """
        Open the allocation's namespaces, in request order; the caller owns the bundle.

        Raises:
            AllocationNotFound: there is no such allocation.
            FdPassing: its init is dead, or no descriptor is left.
        """
        life = self._life(allocation_id)
        if life.anchor is None or life.is_released:
            raise AllocationNotFound(allocation_id)
        try:
            return open_bundle(life.anchor, life.request.namespaces, self._features)
        except SyscallError as error:
            raise FdPassing(str(error)) from error

    def scope_of(self, allocation_id: str) -> Path | None:
        """
        Say which cgroup an allocation's processes belong in; None where no scopes are made.

        Raises:
            AllocationNotFound: there is no such allocation.
        """
        scope = self._life(allocation_id).scope
        return None if scope is None else scope.path

    def why_alive(self, allocation_id: str) -> str | None:
        """Say what the last try to release found in its way; None when nothing is left."""
        # Keeps END-9.
        life = self._lives.get(allocation_id)
        if life is None:
            return None
        return life.why or "its release has not been tried"

    def record_handed_off(self, allocation_id: str) -> None:
        """
        Journal that an allocation was handed over.

        If the journal cannot be written, a later provider takes it for one that was not handed over
        yet: it is adopted and handed over all the same.
        """
        life = self._lives.get(allocation_id)
        if life is not None and not life.is_released:
            try:
                self._note(life, "handed_off")
            except JournalError as error:
                _log.warning("the hand-off of %s is not journaled: %s", allocation_id, error)

    def record_ended(self, allocation_id: str) -> None:
        """Journal that an allocation is over; a creation under way will not be published."""
        # Keeps END-14, CRASH-5.
        with self._guard:
            self._over.add(allocation_id)
            life = self._lives.get(allocation_id)
            if life is not None:
                self._note_end(life)

    def watch(self, allocation_id: str) -> None:
        """Begin to observe an allocation's scope and its anchor; nothing of what is released."""
        life = self._life(allocation_id)
        if life.is_released:
            # Whatever is added now would not be taken off any more.
            return
        life.is_watched = True
        try:
            self._watch_scope(life)
        except SyscallError:
            # It is gone already, which the next look tells; or no descriptor is left for it.
            self._call_again(life.name)
        if life.anchor is not None:
            self._watch.add(("anchor", life.name), life.anchor.pidfd.fileno(), ScopeWatch.DEATH)

    def fileno(self) -> int:
        """Lend the descriptor that is readable when there is something to observe."""
        return self._watch.fileno()

    def observe(self) -> list[Observation]:
        """Say what has been seen since the last call; an event is a hint, the state decides."""
        seen: list[Observation] = []
        for kind, name in self._watch.poll():
            if kind == "anchor":
                seen.append(Observation(name, Sighting.INIT_DIED))
            else:
                names = self._take_again() if kind == "again" else [name]
                seen += [o for o in map(self._look_at_scope, names) if o is not None]
        return seen

    def is_over(self, allocation_id: str) -> bool:
        """Read whether the scope was used and is empty."""
        life = self._lives.get(allocation_id)
        if life is None or life.scope is None:
            return False
        try:
            if life.scope.is_over():
                return True
        except ScopeError:
            self._call_again(allocation_id)
            return False
        if life.is_watched and life.events is None:
            self._call_again(allocation_id)
        return False

    def tidy(self) -> float | None:
        """Unmount images whose last user left long enough ago."""
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
            stack.callback(self._nudge.close)
            stack.callback(self._watch.close)
            with self._guard:
                for life in self._lives.values():
                    for descriptor in (life.image, life.events, life.anchor):
                        if descriptor is not None:
                            stack.callback(descriptor.close)
                self._lives.clear()

    # --- Steps ---------------------------------------------------------------------------------

    def _begin(self, life: _Life) -> None:
        with self._guard:
            if life.name in self._lives:
                raise CreationFailed(f"allocation {life.name} is alive already")
            self._lives[life.name] = life

    def _intend(self, life: _Life) -> None:
        # Keeps CRASH-3.
        if self._journal is not None:
            self._journal.intend(Entry(life.name, life.token, "requested", life.request))
            life.is_journaled = True

    def _make_scope(self, life: _Life) -> None:
        # Keeps NODE-2.
        root = self._settings.cgroup2
        assert root is not None
        try:
            life.scope = Scope.create(root, life.name, life.token)
        except ScopeError as error:
            if error.errno != errno.EEXIST or self._journal is not None:
                raise
            # The provider's own set for this allocation is still there, or coming. The consumer
            # does not wait for it, and what it starts must not be killed with it.
            life.scope = Scope.create(_mirror(root), life.name, life.token)
        life.undo.append(Undo("remove the scope", lambda: _undo_scope(life)))

    def _mount_image(self, life: _Life) -> None:
        image = life.request.uenv_image
        assert image is not None
        life.image = self._images.acquire(image, life.token)
        life.undo.append(Undo("let go of the image", lambda: self._undo_image(life)))

    def _make_anchor(self, life: _Life) -> None:
        image, life.image = life.image, None
        base = path = None
        if life.request.uenv_image is not None:
            base = str(self._settings.uenv_base)
            path = mount_path_below(base, life.request.uenv_image)
        scope = None if life.scope is None else str(life.scope.path)
        anchor_plan = AnchorPlan(life.token, life.request.namespaces, base, path, scope)
        life.anchor = self._forge.make(anchor_plan, image)
        life.undo.append(Undo("end the init", lambda: _undo_anchor(life)))

    def _publish(self, life: _Life) -> None:
        if self._journal is None:
            return
        assert life.anchor is not None
        identity = life.anchor.identity(self._features)
        with self._guard:
            if life.name in self._over:
                raise Overtaken("the allocation has ended meanwhile")
            self._journal.publish(
                life.name,
                "created",
                mount_path=self._response_to(life.request).uenv_mount_path,
                anchor=identity.as_json(),
                scope_path=None if life.scope is None else str(life.scope.path),
            )

    def _undo_image(self, life: _Life) -> str | None:
        # Keeps NODE-14.
        if life.anchor is not None:
            return "the image is mounted in the namespace of a living init"
        self._images.release(life.token)
        return None

    # --- Ending --------------------------------------------------------------------------------

    def _abandon(self, life: _Life) -> None:
        """Undo what was done of a plan; what cannot go yet stays, for `release_namespaces`."""
        self._end(life)
        life.why = _attempt(life.undo)
        if not life.undo:
            with suppress(JournalError):
                self._strike_out(life)

    def _end(self, life: _Life) -> None:
        # Keeps END-8.
        if life.is_released:
            return
        with self._guard:
            self._note_end(life)
            life.is_released = True
        self._watch.remove(("scope", life.name))
        self._watch.remove(("anchor", life.name))
        for descriptor in (life.events, life.image):
            if descriptor is not None:
                descriptor.close()

    def _note_end(self, life: _Life) -> None:
        try:
            self._note(life, "ended")
        except JournalError as error:
            # What runs is ended all the same. A provider that starts before it is gone, and can
            # read what could not be written, finds it half gone: remains.
            _log.warning("the end of %s is not journaled: %s", life.name, error)

    def _strike_out(self, life: _Life) -> None:
        if self._journal is not None and life.is_journaled:
            self._journal.forget(life.name)
        with self._guard:
            self._over.discard(life.name)
            self._lives.pop(life.name, None)

    # --- Recovering ----------------------------------------------------------------------------

    def recover(self) -> Recovery:
        """
        Find what an earlier provider left: adopt what is alive and whole, mark the rest.

        An anchor in our own cgroup that no journal entry knows belongs to nobody, and is ended.
        """
        # Keeps CRASH-2, CRASH-3, CRASH-4.
        if self._journal is None:
            return Recovery()
        strays = {} if self._anchors is None else find_anchors(self._anchors)
        adoptions = tuple(
            self._adopt(entry, strays.pop(entry.incarnation, None))
            for entry in self._journal.entries()
        )
        for anchor in strays.values():
            anchor.kill()
            anchor.close()
        return Recovery(adoptions, self._journal.remembered())

    def _adopt(self, entry: Entry, found: Anchor | None) -> Adoption:
        """Rebuild a life from what the journal says and the Linux kernel confirms."""
        life = _Life(entry.request, entry.incarnation, is_journaled=True)
        self._lives[life.name] = life
        self._adopt_scope(life)
        if entry.request.uenv_image is not None:
            life.undo.append(Undo("let go of the image", lambda: self._undo_image(life)))
        self._adopt_anchor(life, entry, found)
        is_whole = life.anchor is not None and (life.scope is not None or not self._has_scopes)
        if not is_whole or entry.state not in _STANDINGS:
            return Adoption(Standing.REMAINS, entry.request, None)
        self._adopt_image(life)
        return Adoption(_STANDINGS[entry.state], entry.request, self._response_to(entry.request))

    def _adopt_scope(self, life: _Life) -> None:
        root = self._settings.cgroup2
        life.scope = None if root is None else Scope.open(root, life.name, life.token)
        if life.scope is not None:
            life.undo.append(Undo("remove the scope", lambda: _undo_scope(life)))

    def _adopt_anchor(self, life: _Life, entry: Entry, found: Anchor | None) -> None:
        life.anchor = found
        if found is None and entry.anchor is not None:
            identity = AnchorIdentity.from_json(entry.anchor)
            life.anchor = adopt(identity, life.token, self._features)
        if life.anchor is not None:
            life.undo.append(Undo("end the init", lambda: _undo_anchor(life)))

    def _adopt_image(self, life: _Life) -> None:
        """Find the image's mount again, so that whoever asks for it next shares it."""
        if life.request.uenv_image is not None:
            # If it cannot be found (deleted, replaced), the allocation has it all the same; only
            # the next allocation will have to mount it anew.
            with suppress(*_FAILURES):
                self._images.adopt(life.request.uenv_image, life.token)

    # --- Small things --------------------------------------------------------------------------

    @property
    def _has_scopes(self) -> bool:
        return self._settings.cgroup2 is not None

    def _life(self, allocation_id: str) -> _Life:
        life = self._lives.get(allocation_id)
        if life is None:
            raise AllocationNotFound(allocation_id)
        return life

    def _note(self, life: _Life, state: State, *, why: str | None = None) -> None:
        if self._journal is not None and life.is_journaled:
            self._journal.publish(life.name, state, why=why)

    def _response_to(self, request: NamespaceRequest) -> NamespaceResponse:
        path = None
        if request.uenv_image is not None:
            path = mount_path_below(str(self._settings.uenv_base), request.uenv_image)
        return NamespaceResponse(request.allocation_id, request.namespaces, path)

    def _watch_scope(self, life: _Life) -> None:
        with self._guard:  # against `_end`, in another thread
            if life.scope is not None and life.events is None and not life.is_released:
                # Kept only once it is watched: what is kept is not tried again.
                with ExitStack() as undo:
                    events = undo.enter_context(life.scope.open_events())
                    self._watch.add(("scope", life.name), events.fileno())
                    undo.pop_all()
                life.events = events

    def _look_at_scope(self, name: str) -> Observation | None:
        life = self._lives.get(name)
        if life is None or life.scope is None or life.is_released:
            return None
        try:
            if life.scope.is_over():
                return Observation(name, Sighting.EMPTIED)
            self._watch_scope(life)
            is_populated = life.scope.is_populated()
        except SyscallError:
            # It is there and could not be read; no descriptor is left, perhaps.
            return Observation(name, Sighting.CHANGED)
        return Observation(name, Sighting.POPULATED if is_populated else Sighting.CHANGED)

    def _call_again(self, name: str) -> None:
        """Have `observe` called at once, to look at a scope of which nothing need be heard."""
        self._again.add(name)
        self._watch.remove(_AGAIN)
        self._watch.add(_AGAIN, self._nudge.fileno(), ScopeWatch.DEATH)

    def _take_again(self) -> list[str]:
        names = sorted(self._again)
        self._again.clear()
        return names


_STANDINGS: Final = {"created": Standing.CREATED, "handed_off": Standing.HANDED_OFF}

_INTEND: Final = Step("journal the intent", LinuxBackend._intend)
_SCOPE: Final = Step("make the scope", LinuxBackend._make_scope)
_IMAGE: Final = Step("mount the image", LinuxBackend._mount_image)
_ANCHOR: Final = Step("make the namespaces", LinuxBackend._make_anchor)
_PUBLISH: Final = Step("publish the result", LinuxBackend._publish)


def plan(request: NamespaceRequest, *, has_scopes: bool = True) -> tuple[Step, ...]:
    """
    Decide what to do for a request, in which order; pure.

    The scope comes first: its name is what two makers of one allocation would collide on. The
    image comes before the namespaces, because it is moved into them while they are made.
    """
    # Keeps NODE-6.
    steps = [_SCOPE] if has_scopes else []
    if request.uenv_image is not None:
        steps.append(_IMAGE)
    return (*steps, _ANCHOR)


def instance_of(state_dir: Path) -> str:
    """Name a provider's instance on the node, so that two of them never mix up their anchors."""
    digest = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()
    return f"nshandoff-{digest[:16]}"


def _attempt(undo: list[Undo]) -> str | None:
    """Try every undo that is left, last step first; keep those that are in the way of something."""
    left: list[Undo] = []
    reasons: list[str] = []
    for step in reversed(undo):
        try:
            reason = step.attempt()
        except _FAILURES as error:
            reason = str(error)
        if reason is not None:
            left.append(step)
            reasons.append(f"{step.step}: {reason}")
    undo[:] = reversed(left)
    return "; ".join(reasons) or None


def _undo_anchor(life: _Life) -> str | None:
    anchor = life.anchor
    if anchor is None:
        return None
    anchor.kill()
    # An init takes a millisecond or two to die, most of it for its mounts. That is waited for once,
    # because nearly always it saves a second try; whatever takes longer is never waited for.
    if anchor.is_alive(patience_ms=0 if life.tries else DYING_PATIENCE_MS):
        life.tries += 1
        if life.tries < SURVEY_AFTER_TRIES:
            return f"init {anchor.pid} is being killed"
        return zombies_below(anchor.pid)
    anchor.close()
    life.anchor = None
    return None


def _undo_scope(life: _Life) -> str | None:
    scope = life.scope
    if scope is None or scope.is_gone():
        return None
    scope.kill()
    if not scope.remove():
        return f"processes in {scope.path}: {states_of(scope.processes())}"
    return None


def _mirror(root: Path) -> Path:
    mirror = root / SELF_SERVICE_SLICE
    with calling("mkdir(2)", mirror):
        syscall(mirror.mkdir, exist_ok=True)
    return mirror


def _remove_mirror(root: Path) -> None:
    mirror = root / SELF_SERVICE_SLICE
    if syscall(mirror.is_dir):
        remove_slices(mirror)
        with suppress(OSError):
            syscall(mirror.rmdir)
