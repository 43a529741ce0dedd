"""Examine a node for what crashed or lost providers left, say what is alive, release what is dead.

Reads the state directory and the Linux kernel, and asks no provider. Everything that is found gets
one of the verdicts of `linux.recovery`, with the proof or what is missing for one. `repair` acts on
what is proved dead and on nothing else, and only while it holds the lock that a running provider
would hold, so it can never be in the way of one.

    examine     what there is, for `nshandoff doctor` and `nshandoff list`
    repair      release what is proved dead, set a damaged journal aside
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from statemachine.record import record
from transport.calls import syscall

from .anchor import boot_id, find_tokens
from .cgroups import (
    SELF_SERVICE_SLICE,
    WORKLOAD_SLICE,
    CgroupUnavailable,
    DescribedScope,
    ScopePlace,
    described_scopes,
    end_scope,
    find_cgroup2,
    instances,
    remove_anchor_cgroup,
    remove_slices,
)
from .features import Features
from .instance import (
    OWN_TOKEN_PREFIX,
    Instance,
    InstanceBusy,
    instance_of,
    is_locked,
    is_own_scope_held,
    noted_changes,
    provider_of,
    release_ownerless,
    scope_parents_of,
)
from .journal import (
    JOURNAL_NAME,
    Entry,
    JournalBusy,
    JournalCorrupt,
    JournalError,
    JournalUnavailable,
    JournalView,
    is_held,
    lock_directory,
    read_journal,
    set_aside,
)
from .pool import POOL_TOKEN_PREFIX
from .recovery import Action, Case, Verdict, find_cases, read_description


@record
class Finding:
    """One thing that was found."""

    what: str
    """What it is, in words: an allocation, a journal, a provider."""
    verdict: Verdict
    """Whether it is alive. UNKNOWN also for what is damaged or missing."""
    why: str
    """The proof, or what is missing for one."""
    advice: str | None = None
    """What to do; None if nothing has to be done."""
    instance: str | None = None
    """The provider instance that it belongs to, if one."""
    token: str | None = None
    """Of the incarnation, if it is one."""
    is_repairable: bool = False
    """Whether `repair` can settle it."""

    @property
    def needs_attention(self) -> bool:
        """Whether something has to be done about it."""
        return self.advice is not None


def examine(state_dir: Path, features: Features, *, is_whole_node: bool = True) -> list[Finding]:
    """
    Find what is on the node of this state directory's provider, and of providers that are lost.

    Args:
        state_dir: Must exist.
        is_whole_node: False looks at this state directory's provider alone.
        features: What the Linux kernel can do.

    Raises:
        JournalUnavailable: there is no such directory, or the journal cannot be opened.
        SyscallError: something on the node cannot be read.
    """
    expect_directory(state_dir)
    root = _find_root()
    view, findings = _examine_journal(state_dir, root)
    own = _instance(view, state_dir)
    if view is not None:
        findings += _examine_own(state_dir, view, own, root, features)
    if root is not None and is_whole_node:
        findings += _examine_others(root, own, features)
    return findings


def expect_directory(state_dir: Path) -> None:
    """
    Refuse a state directory that is not there: it is mistyped, or was removed.

    Raises:
        JournalUnavailable: it is no directory.
    """
    if not syscall(state_dir.is_dir):
        raise JournalUnavailable(state_dir, "there is no such state directory")


def repair(findings: Iterable[Finding], state_dir: Path, features: Features) -> list[str]:
    """
    Settle what can be: release what is proved dead, and set a damaged journal aside.

    Everything is looked at again under the lock of its instance; what has changed is left alone.

    Args:
        findings: From `examine`.
        state_dir: As given to `examine`.
        features: What the Linux kernel can do.

    Returns:
        What was done, in words.

    Raises:
        JournalError, SyscallError: it cannot be done; what was done before stays done.
    """
    # Keeps CRASH-19.
    done: list[str] = []
    wanted = [finding for finding in findings if finding.is_repairable]
    if any(finding.token is None for finding in wanted):
        with suppress(JournalBusy), lock_directory(state_dir):
            done += [f"set aside as {path}" for path in set_aside(state_dir)]
    root = _find_root()
    if root is None:
        return done
    view, _ = _examine_journal(state_dir, root)
    parents = _scope_parents(root)
    for name in sorted({it.instance for it in wanted if it.instance and it.token}):
        tokens = {it.token for it in wanted if it.instance == name}
        entries = view.entries if view is not None and name == _instance(view, state_dir) else ()
        # A provider that runs by now settles what is its own.
        with suppress(InstanceBusy), Instance.lock(root, name, None):
            for case in find_cases(entries, name, root, features):
                if case.token in tokens and _is_dead(case):
                    done.append(_release(case))
                case.close()
            remove_anchor_cgroup(root, name)
    ownerless = {it.token for it in wanted if it.token and it.instance is None}
    for scope in _loose_scopes(described_scopes(root, parents), root):
        if scope.owner in ownerless and release_ownerless(scope.path):
            done.append(f"released {_name_of(scope)}")
    for parent in sorted(parents):
        remove_slices(root, ScopePlace(parent))
    return done


# --- What there is -----------------------------------------------------------------------------


def _find_root() -> Path | None:
    with suppress(CgroupUnavailable):
        return find_cgroup2()
    return None


def _instance(view: JournalView | None, state_dir: Path) -> str:
    name = None if view is None else view.instance
    return instance_of(state_dir) if name is None else name


def _examine_journal(
    state_dir: Path, root: Path | None
) -> tuple[JournalView | None, list[Finding]]:
    what = f"journal {state_dir / JOURNAL_NAME}"
    try:
        view = read_journal(state_dir)
    except JournalCorrupt as error:
        advice = (
            "stop the provider; --repair sets the journal aside, and a provider that starts then"
            " adopts what the node still has"
        )
        is_repairable = not is_held(state_dir)
        return None, [
            Finding(what, Verdict.UNKNOWN, error.reason, advice, is_repairable=is_repairable)
        ]
    if root is None or is_held(state_dir):
        return view, []
    noted = noted_changes(root, _instance(view, state_dir))
    if noted <= view.changes:
        return view, []
    why = f"it has {view.changes} of {noted} changes: it was damaged, or is an older copy"
    advice = "start the provider: it looks for what is lost on the node"
    return view, [Finding(what, Verdict.UNKNOWN, why, advice)]


def _examine_own(
    state_dir: Path, view: JournalView, own: str, root: Path | None, features: Features
) -> Iterator[Finding]:
    entries = view.entries if view.boot_id == boot_id() else ()
    is_running = is_held(state_dir)
    if is_running:
        yield Finding(f"provider of {state_dir}", Verdict.ALIVE, "it holds the state directory")
    elif root is not None and is_locked(root, own):
        note = provider_of(root, own)
        who = "another process" if note is None else f"process {note.pid} with {note.state_dir}"
        advice = "stop that provider, or use its state directory"
        why = f"{who} holds the anchors of this state directory"
        yield Finding(f"state directory {state_dir}", Verdict.UNKNOWN, why, advice)
        return
    cases = _cases(entries, own, root, features)
    if is_running:
        cases = _still_unnamed(cases, state_dir, own, root, features)
    for case in cases:
        yield _finding(case, own, is_running)


def _still_unnamed(
    cases: list[Case], state_dir: Path, own: str, root: Path | None, features: Features
) -> list[Case]:
    """
    Leave out what a running provider knows of or has under way.

    What it makes has an entry before, and what it releases has one until nothing is left: so look
    twice, with the entries read before each look.
    """
    named = {entry.incarnation for entry in read_journal(state_dir).entries}
    again = _cases(read_journal(state_dir).entries, own, root, features)
    kept = {it.token for it in again if it.action is Action.KEEP}
    lost = {it.token for it in again if it.entry is None} - named
    # What it makes ahead has no entry, and no scope, until it is an allocation's.
    lost = {token for token in lost if not token.startswith(POOL_TOKEN_PREFIX)}
    return [
        case
        for case in cases
        if (case.token in lost and case.entry is None)
        or (case.token in kept and case.action is Action.KEEP)
    ]


def _examine_others(root: Path, own: str, features: Features) -> Iterator[Finding]:
    """Look at other providers of the node, and at scopes that no provider has made."""
    scopes = described_scopes(root, _scope_parents(root))
    described = {scope: read_description(scope.description) for scope in scopes}
    names = {*instances(root), *(found[0] for found in described.values() if found)} - {own}
    for name in sorted(names):
        note = provider_of(root, name)
        state_dir = None if note is None else Path(note.state_dir)
        if is_locked(root, name):
            why = "it holds its anchors"
            yield Finding(f"provider of {state_dir or name}", Verdict.ALIVE, why, instance=name)
        elif state_dir is not None and _has_journal_of(state_dir, name):
            why = f"it does not run; `nshandoff doctor --state-dir {state_dir}` looks at it"
            yield Finding(f"provider of {state_dir}", Verdict.ALIVE, why, instance=name)
        else:
            for case in _cases((), name, root, features):
                yield _finding(case, name, is_running=False, lost=state_dir)
    yield from _examine_loose(_loose_scopes(scopes, root))


def _loose_scopes(scopes: list[DescribedScope], root: Path) -> list[DescribedScope]:
    """List the scopes that no provider has made; given are those where providers' scopes are."""
    loose = [scope for scope in scopes if read_description(scope.description) is None]
    return loose + described_scopes(root / SELF_SERVICE_SLICE)


def _name_of(scope: DescribedScope) -> str:
    return f"scope of {scope.path.name.removesuffix('.scope')}"


def _scope_parents(root: Path) -> frozenset[str]:
    """Say in which cgroups scopes of any provider of the node can be."""
    return frozenset({WORKLOAD_SLICE}).union(
        *(scope_parents_of(root, name) for name in instances(root))
    )


def _examine_loose(loose: list[DescribedScope]) -> Iterator[Finding]:
    """Look at scopes that no provider has made, most of them consumers' that serve themselves."""
    found = find_tokens({scope.owner for scope in loose if scope.owner is not None})
    for scope in loose:
        what, owner = _name_of(scope), scope.owner or ""
        pid = found.get(owner)
        if owner.startswith(OWN_TOKEN_PREFIX) and not is_own_scope_held(scope.path):
            why, advice = "the consumer that made it for itself is dead", "--repair releases it"
            yield Finding(what, Verdict.DEAD, why, advice, token=owner, is_repairable=True)
        elif pid is not None:
            yield Finding(what, Verdict.ALIVE, f"process {pid} is its init; no provider's")
        else:
            why = "no provider has made it, and no process has its token"
            advice = "if no consumer is just making it, end what runs in it and remove it"
            yield Finding(what, Verdict.UNKNOWN, why, advice)


def _has_journal_of(state_dir: Path, instance: str) -> bool:
    try:
        return read_journal(state_dir).instance == instance
    except JournalCorrupt:
        return True  # damaged, and there all the same
    except JournalError:
        return False


def _cases(
    entries: Iterable[Entry], instance: str, root: Path | None, features: Features
) -> list[Case]:
    """Find the cases of an instance, without holding on to their inits."""
    cases = find_cases(entries, instance, root, features)
    for case in cases:
        case.close()
    return cases


def _is_dead(case: Case) -> bool:
    """Say whether a repair may release it: proved dead, and no entry leads a provider to it."""
    return case.entry is None and case.row.verdict is Verdict.DEAD


def _finding(case: Case, instance: str, is_running: bool, lost: Path | None = None) -> Finding:
    pid = "" if case.anchor is None else f", init {case.anchor.pid}"
    what = f"allocation {case.name or case.token}{pid}"
    is_repairable = _is_dead(case) and not is_running
    return Finding(
        what,
        case.row.verdict,
        case.row.why,
        _advice(case, is_running, lost),
        instance,
        case.token,
        is_repairable,
    )


def _advice(case: Case, is_running: bool, lost: Path | None) -> str | None:
    if case.entry is not None and case.action is not Action.KEEP:
        return None  # the provider does what is to be done, now or when it starts
    if _is_dead(case):
        return "restart the provider" if is_running else "--repair releases it"
    if case.action is Action.ADOPT:
        where = "" if lost is None else f" with --state-dir {lost}"
        return f"{'restart' if is_running else 'start'} a provider{where}: it adopts it"
    if case.anchor is None:
        return "end what runs in its scope, if it is not needed; then --repair releases it"
    return f"if it is not needed, end its init: kill -9 {case.anchor.pid}"


# --- Repairing ---------------------------------------------------------------------------------


def _release(case: Case) -> str:
    """End what is left of a case that is proved dead; it was looked at under its lock just now."""
    what = f"allocation {case.name or case.token}"
    if case.anchor is not None:
        case.anchor.kill()
    if case.scope is None or end_scope(case.scope):
        return f"released {what}"
    return f"killed {what}; its processes are not gone yet"
