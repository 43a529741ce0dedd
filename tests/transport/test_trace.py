"""A trace says exactly what happened, and what did not happen is found at its first line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linux.cli import command as cli
from linux.cli.exits import ExitCode, Failure
from linux.cli.trace import TraceFile
from statemachine import effects as do
from statemachine import events as on
from statemachine.errors import CreationFailed, FdPassing
from statemachine.events import Event
from statemachine.messages import NamespaceRequest, NamespaceResponse
from statemachine.provider import Limits, ProviderKernel
from statemachine.testing.strategies import EFFECTS, PROVIDER_INPUTS, values_of
from tests.support.programs import NET, PID, daemon_in, nshandoff, wait_until
from transport.trace import Recovered, Start, TraceError, Turn, decode_line, encode_line, read_lines
from transport.trace import records as trace
from transport.trace.check import ImpossibleLine, Replay
from transport.trace.diagram import sequence_diagram

A: Final = NamespaceRequest("a", (PID, NET), None)
MADE: Final = NamespaceResponse("a", (PID, NET), None)


# --- Lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PROVIDER_INPUTS, *EFFECTS], ids=lambda kind: kind.__name__)
def test_basic_every_event_and_effect_comes_back_as_it_was(kind: type) -> None:
    @settings(max_examples=10)
    @given(values_of(kind), st.integers(min_value=0))
    def comes_back(value: Any, sequence: int) -> None:
        is_event = isinstance(value, Event)
        turn = Turn(value, ()) if is_event else Turn(on.ProviderReady(), (value, value))
        line = encode_line(sequence, turn)
        assert line.isascii()
        assert line.index(b"\n") == len(line) - 1
        assert decode_line(1, line) == (sequence, turn)

    comes_back()


@given(st.one_of(values_of(Start), values_of(Recovered)), st.integers())
def test_starts_and_recoveries_come_back_too(entry: Start | Recovered, sequence: int) -> None:
    assert decode_line(1, encode_line(sequence, entry)) == (sequence, entry)


def test_what_a_path_brings_along_that_is_no_unicode_comes_back() -> None:
    turn = Turn(on.FrameRejected("\udcff\x00\u2028"), ())
    assert decode_line(1, encode_line(0, turn)) == (0, turn)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not a line of JSON"),
        (b"\xff", "not a line of JSON"),
        (b"[" * 200_000, "not a line of JSON"),
        (b"[]", "not of schema 1"),
        (b'{"seq":0,"recovery":{"remembered":[]}}', "not of schema 1"),
        (b'{"schema":2,"seq":0,"recovery":{"remembered":[]}}', "not of schema 1"),
        (b'{"schema":1,"seq":true,"recovery":{"remembered":[]}}', "True is no int"),
        (b'{"schema":1,"seq":0,"recovery":{"remembered":[1]}}', "1 is no str"),
        (b'{"schema":1,"seq":0,"recovery":{"remembered":{}}}', "{} is no list"),
        (b'{"schema":1,"seq":0,"recovery":{}}', "{} is no Recovered"),
        (b'{"schema":1,"seq":0,"recovery":{"remembered":[]},"effects":[]}', "is no Turn"),
        (b'{"schema":1,"seq":0,"event":{"Nonsense":{}},"effects":[]}', "is none of"),
        (b'{"schema":1,"seq":0,"event":{"ProviderReady":[]},"effects":[]}', "no ProviderReady"),
        (b'{"schema":1,"seq":0,"event":{"AllocationEvent":{}},"effects":[]}', "is none of"),
        (b'{"schema":1,"seq":0,"event":{"EndWanted":{}},"effects":[]}', "is none of"),
        (b'{"schema":1,"seq":0,"event":{"Unclaimed":{}},"effects":[]}', "is none of"),
    ],
)
def test_what_is_no_line_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(TraceError, match=r"^line 7: ") as refusal:
        decode_line(7, text)
    assert (refusal.value.line, says in refusal.value.reason) == (7, True)


def test_line_that_is_too_long_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LINE_BYTES_MAX", 100)
    with pytest.raises(TraceError, match="over 100 bytes"):
        decode_line(1, b" " * 101)


# --- Lives, and what is no life ----------------------------------------------------------------


def written(*events: Event, start: Start | None = None) -> list[bytes]:
    """What a provider writes down that is fed these."""
    start = start or Start(Limits())
    kernel = ProviderKernel(start.limits)
    turns = [Turn(event, kernel.receive(event)) for event in events]
    return numbered(start, Recovered(()), *turns)


def numbered(*entries: trace.TraceEntry) -> list[bytes]:
    return [encode_line(number, entry) for number, entry in enumerate(entries)]


def renumbered(lines: list[bytes]) -> list[bytes]:
    return numbered(*(entry for _, _, entry in read_lines(lines)))


def lines_in(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def refusal_of(lines: list[bytes]) -> ImpossibleLine:
    with pytest.raises(ImpossibleLine) as refusal:
        Replay().take_all(lines)
    return refusal.value


LIFE: Final = (
    on.ProviderReady(),
    on.ConnectionOpened(1, 0),
    on.ConnectionOpened(2, 7),
    on.ConnectionLost(2, "closed"),
    on.RequestReceived(1, A),
    on.NamespacesCreated("a", MADE),
    on.ResponseSent("a", 1),
    on.ScopePopulated("a"),
    on.RequestReceived(1, NamespaceRequest("a", (NET,), None)),
    on.ScopeEmptied("a"),
    on.ReleaseDelayed("a", "pid 3 is stuck; #1"),
    on.RetryDue("a"),
    on.NamespacesReleased("a"),
    on.EndReceived(1, "a"),
    on.EndReceived(1, "b"),
)
FIRST: Final = 3
"""The line of the first event; before it stand a start and a recovery."""

RESTART: Final = (
    on.ConnectionOpened(1, 0),
    on.RequestReceived(1, A),
    on.HandedOffAdopted("a", A, MADE),
    on.ProviderReady(),
    on.ResponseSent("a", 1),
)


def line_of(kind: type[Event]) -> int:
    return FIRST + [type(event) for event in LIFE].index(kind)


def test_life_and_another_after_a_crash_are_possible() -> None:
    replay = Replay()
    end = (on.EndReceived(1, "a"), on.NamespacesReleased("a"))
    lives = (LIFE[:8], (*RESTART, *end), LIFE)
    replay.take_all([line for life in lives for line in written(*life)])
    assert (replay.starts, replay.gaps) == (3, 0)
    assert replay.turns == sum(map(len, lives))


def test_its_end_may_be_missing_anywhere() -> None:
    whole = b"".join(written(*LIFE))
    for size in range(len(whole)):
        Replay().take_all(whole[:size].splitlines(keepends=True))


@pytest.mark.parametrize("at", range(FIRST, FIRST + len(LIFE) - 1))
def test_dropped_line_is_missed_at_the_next_one(at: int) -> None:
    lines = written(*LIFE)
    del lines[at - 1]
    refusal = refusal_of(lines)
    assert (refusal.line, "lines are missing" in refusal.reason) == (at, True)
    allowed = "allowed: CreatedAdopted, HandedOffAdopted, RemainsFound, ProviderReady"
    assert refusal.instead == (allowed,)


def test_after_a_gap_adoptions_are_the_only_way_on() -> None:
    replay = Replay()
    replay.take_all([*written(*LIFE[:8]), *written(*RESTART[2:4])[2:]])
    assert (replay.starts, replay.gaps) == (1, 1)


@pytest.mark.parametrize("at", range(FIRST, FIRST + len(LIFE) - 1))
def test_swapped_lines_are_found_at_the_first(at: int) -> None:
    lines = written(*LIFE)
    lines[at - 1], lines[at] = lines[at], lines[at - 1]
    assert refusal_of(lines).line == at


def test_swapped_lines_are_found_even_with_new_numbers() -> None:
    lines = written(*LIFE)
    at = line_of(on.NamespacesCreated)
    lines[at - 1], lines[at] = lines[at], lines[at - 1]
    refusal = refusal_of(renumbered(lines))
    assert refusal.line == at
    assert refusal.reason == "ResponseSent is not possible while allocation a is requested"
    assert refusal.instead == (
        "allowed: NamespacesCreated, NamespacesNotCreated, RequestReceived, ConnectionLost, "
        "EndReceived, ReleaseRequested",
    )


def with_effects() -> Iterator[int]:
    for number, _, entry in read_lines(written(*LIFE)):
        if isinstance(entry, Turn) and entry.effects:
            yield number


@pytest.mark.parametrize("at", list(with_effects()))
@pytest.mark.parametrize("forge", ["one less", "one more", "another"])
def test_changed_effect_is_named_with_what_was_expected(at: int, forge: str) -> None:
    lines = written(*LIFE)
    sequence, entry = decode_line(at, lines[at - 1])
    assert isinstance(entry, Turn)
    other = do.Refuse(9, FdPassing("never said"))
    effects = {
        "one less": entry.effects[1:],
        "one more": (*entry.effects, other),
        "another": (other, *entry.effects[1:]),
    }[forge]
    lines[at - 1] = encode_line(sequence, Turn(entry.event, effects))
    refusal = refusal_of(lines)
    assert (refusal.line, "has other effects" in refusal.reason) == (at, True)
    found, expected = refusal.instead
    assert found.startswith("found:    [")
    assert f'{{"{type(entry.effects[0]).__name__}": ' in expected


INVENTED: Final = [
    # (after which event, what, what it says, something allowed there)
    (on.NamespacesCreated, on.NamespacesCreated("a", MADE), "allocation a is created", "InitDied"),
    (on.ResponseSent, on.ResponseSent("a", 1), "what was not asked for", "ScopeEmptied"),
    (on.ResponseSent, on.ResponseSent("a", 2), "what was not asked for", "ScopeEmptied"),
    (on.ScopePopulated, on.ClaimExpired("a"), "without a claim timer", "ScopeEmptied"),
    (on.ScopePopulated, on.NamespacesReleased("a"), "allocation a is handed_off", "InitDied"),
    (on.ScopeEmptied, on.RetryDue("a"), "without a retry timer", "ReleaseDelayed"),
    (on.ReleaseDelayed, on.NamespacesReleased("a"), "not being released", "RetryDue"),
    (on.NamespacesReleased, on.ScopeEmptied("a"), "allocation a is released", "RequestReceived"),
    (on.NamespacesReleased, on.CreatedAdopted("a", A, MADE), "provider is ready", "EndReceived"),
    (on.ConnectionLost, on.EndReceived(2, "a"), "2 is not open", "ConnectionOpened"),
    (on.ConnectionLost, on.ConnectionOpened(1, 0), "1 is open", "ConnectionLost"),
    (on.ConnectionOpened, on.ConnectionOpened(1, 0), "1 is open", "RequestReceived"),
    (on.ConnectionLost, on.ReadinessOverdue(), "provider is ready", "ProviderStopping"),
    (on.ConnectionLost, on.ProviderReady(), "provider is ready", "ProviderStopping"),
]


@pytest.mark.parametrize(("after", "event", "says", "allowed"), INVENTED)
def test_invented_event_is_named_with_what_was_allowed(
    after: type[Event], event: Event, says: str, allowed: str
) -> None:
    entries: list[trace.TraceEntry] = [entry for _, _, entry in read_lines(written(*LIFE))]
    at = line_of(after) + 1
    entries.insert(at - 1, Turn(event, ()))
    refusal = refusal_of(numbered(*entries))
    assert (refusal.line, says in refusal.reason) == (at, True)
    (instead,) = refusal.instead
    names = instead.removeprefix("allowed: ").split(", ")
    assert allowed in names
    assert type(event).__name__ not in names


def after_a_crash(*before: Event, remembered: tuple[str, ...] = (), found: list[Event]) -> Replay:
    """A provider is killed, and the next one finds this."""
    start, _, *turns = (entry for _, _, entry in read_lines(written(*found)))
    replay = Replay()
    replay.take_all([*written(*before), *numbered(start, Recovered(remembered), *turns)])
    return replay


CREATED: Final = on.CreatedAdopted("a", A, MADE)
HANDED_OFF: Final = on.HandedOffAdopted("a", A, MADE)
REMAINS: Final = on.RemainsFound("a", A)
OTHER: Final = NamespaceRequest("a", (PID,), None)
ELSEWHERE: Final = NamespaceResponse("a", (PID, NET), "/elsewhere")


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (on.RequestReceived, None),
        (on.RequestReceived, CREATED),
        (on.RequestReceived, REMAINS),
        (on.NamespacesCreated, CREATED),
        (on.NamespacesCreated, REMAINS),
        (on.ResponseSent, CREATED),
        (on.ResponseSent, HANDED_OFF),
        (on.ScopeEmptied, HANDED_OFF),
        (on.ScopeEmptied, REMAINS),
        (on.ScopeEmptied, None),
        (on.NamespacesReleased, None),
    ],
)
def test_what_a_crash_can_leave_may_be_found(last: type[Event], found: Event | None) -> None:
    life = LIFE[: line_of(last) - FIRST + 1]
    events = [*([found] if found else []), on.ProviderReady()]
    assert after_a_crash(*life, found=events).starts == 2


@pytest.mark.clause("CRASH-5")
@pytest.mark.parametrize(
    ("last", "found", "says"),
    [
        (on.RequestReceived, HANDED_OFF, "it was only requested"),
        (on.NamespacesCreated, HANDED_OFF, "it was only created"),
        (on.NamespacesCreated, None, "ready, but a, which was created, was not found"),
        (on.ScopePopulated, None, "ready, but a, which was handed_off, was not found"),
        (on.ScopePopulated, on.CreatedAdopted("a", OTHER, MADE), "it had another request"),
        (on.ScopePopulated, on.RemainsFound("a", OTHER), "it had another request"),
        (on.ScopePopulated, on.HandedOffAdopted("a", A, ELSEWHERE), "it had another response"),
        (on.ReleaseOverdue, CREATED, "its end was announced"),
        (on.NamespacesReleased, CREATED, "it was not there"),
        (on.NamespacesReleased, REMAINS, "it was not there"),
        (on.ConnectionLost, CREATED, "it was not there"),
    ],
)
def test_what_a_crash_cannot_leave_is_found_out(
    last: type[Event], found: Event | None, says: str
) -> None:
    life = [*LIFE[:10], on.ReleaseOverdue("a"), *LIFE[10:]]
    life = life[: [type(event) for event in life].index(last) + 1]
    events = [*([found] if found else []), on.ProviderReady()]
    with pytest.raises(ImpossibleLine) as refusal:
        after_a_crash(*life, found=events)
    assert says in refusal.value.reason
    assert refusal.value.line == 2 + len(life) + FIRST


def test_what_is_remembered_as_ended_need_not_be_found() -> None:
    """After a reboot the backend remembers every name and finds nothing."""
    after_a_crash(*LIFE[:8], remembered=("a",), found=[on.ProviderReady()])


def test_a_provider_killed_while_it_looked_around_takes_nothing_away() -> None:
    lives = [written(*LIFE[:8]), written(), written(HANDED_OFF), written(HANDED_OFF, LIFE[0])]
    Replay().take_all([line for life in lives for line in life])
    lives[-1] = written(LIFE[0])
    assert "was not found" in refusal_of([line for life in lives for line in life]).reason


def test_recovery_is_only_at_the_start() -> None:
    entries = [entry for _, _, entry in read_lines(written(*LIFE))]
    assert refusal_of(numbered(*entries, Recovered(()))).line == len(entries) + 1


def test_what_the_backend_remembers_counts() -> None:
    events = (on.ConnectionOpened(1, 0), on.ProviderReady(), on.EndReceived(1, "old"))
    start, _, *turns = (entry for _, _, entry in read_lines(written(*events)))
    refusal = refusal_of(numbered(start, Recovered(("old",)), *turns))
    assert (refusal.line, "AnnounceEnd" in refusal.instead[1]) == (5, True)


def test_limits_are_those_of_the_start() -> None:
    strict = Start(Limits(allowed_uids=frozenset({5})))
    lines = written(on.ConnectionOpened(1, 0), on.ConnectionOpened(2, 5), start=strict)
    Replay().take_all(lines)
    assert refusal_of([encode_line(0, Start(Limits())), *lines[1:]]).line == FIRST


def test_memory_does_not_grow_with_the_trace() -> None:
    replay = Replay()
    replay.take_all(written(*LIFE[:2], *LIFE[4:-1] * 50))
    assert not replay._owed._open
    assert not any(replay._owed._on_the_way.values())


# --- Half lines --------------------------------------------------------------------------------


def test_half_a_line_before_a_start_is_none(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    whole = b"".join(written(*LIFE))
    path.write_bytes(whole[:-9])
    with TraceFile(str(path), Limits()) as file:
        file.recovered(())
        file(on.ProviderReady(), ())
    assert path.read_bytes().startswith(whole[:-9] + b'\n{"schema":1,"seq":0,')
    assert cli.main(["trace", "check", str(path)]) == ExitCode.OK
    assert [number for number, _, _ in read_lines(lines_in(path))][-4:] == [16, 18, 19, 20]


@pytest.mark.parametrize("at", [0, 5, -1])
def test_half_a_line_anywhere_else_is_refused(at: int) -> None:
    lines = written(*LIFE)
    lines[at] = lines[at][:-9] + b"\n"
    with pytest.raises(TraceError, match="not a line of JSON") as refusal:
        Replay().take_all(lines)
    assert refusal.value.line == range(1, len(lines) + 1)[at]


@pytest.mark.parametrize(
    "foreign", [b"\x7fELF\0\0\1", b"words", b"SQLite format 3\0\n\0", b"[1]\n"]
)
@pytest.mark.parametrize("verb", ["check", "show"])
def test_what_is_no_trace_is_not_taken_for_half_a_line_of_one(
    tmp_path: Path, foreign: bytes, verb: str
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(foreign)
    assert cli.main(["trace", verb, str(path)]) == ExitCode.NO
    path.write_bytes(b"".join(written(*LIFE)) + foreign)
    assert cli.main(["trace", verb, str(path)]) == ExitCode.NO


def test_file_that_is_full_leaves_a_gap_and_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    with TraceFile("/dev/full", Limits()) as file:
        file(on.ProviderReady(), ())
    assert len(caplog.records) == 2
    assert "No space left" in caplog.text


# --- A real provider ---------------------------------------------------------------------------


@pytest.mark.needs_root
def test_real_lives_of_a_real_provider_are_possible(
    tmp_path: Path, image_root: Path, allocation_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace"
    with daemon_in(tmp_path, image_root, "--trace", str(path)) as daemon:
        with daemon.obtain(f"{allocation_id}-a", PID, NET) as handoff:
            assert handoff.end()
        with daemon.obtain(f"{allocation_id}-b", NET):
            wait_until(lambda: daemon.states() == {f"{allocation_id}-b": "handed_off"})
            daemon.stop(signal.SIGKILL)
        daemon.start()
        # It remembers the first, which was released before it started.
        daemon.consumer().end(f"{allocation_id}-a")
        with daemon.obtain(f"{allocation_id}-b", NET) as handoff:
            assert handoff.end()
    assert path.stat().st_mode & 0o777 == 0o600
    assert cli.main(["trace", "check", str(path)]) == ExitCode.OK
    assert " 2 starts, 0 gaps" in capsys.readouterr().out
    kinds = [type(entry.event) for _, _, entry in read_lines(lines_in(path)) if is_turn(entry)]
    assert kinds.count(on.HandedOffAdopted) == 1
    assert kinds.count(on.NamespacesReleased) == 2
    assert kinds[-1] in (on.ProviderStopping, on.ConnectionLost)


def is_turn(entry: trace.TraceEntry) -> bool:
    return isinstance(entry, Turn)


# --- The command -------------------------------------------------------------------------------


def test_check_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    lines = written(*LIFE)
    path.write_bytes(b"".join([*lines[:4], *lines[5:]]))
    assert cli.main(["trace", "check", str(path)]) == ExitCode.NO
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}:5: lines are missing before this ConnectionLost")
    assert second.startswith("  allowed: CreatedAdopted,")


def test_file_that_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    path.write_text("{}\n")
    assert cli.main(["trace", "check", str(path)]) == ExitCode.NO
    assert cli.main(["trace", "check", str(tmp_path)]) == ExitCode.ENVIRONMENT
    assert "not of schema 1" in capsys.readouterr().out
    shown = nshandoff("trace", "show", path)
    assert (shown.returncode, "not of schema 1" in shown.stderr) == (ExitCode.NO, True)
    assert nshandoff("trace", "show", tmp_path / "absent").returncode == ExitCode.ENVIRONMENT


GOLDEN: Final = """\
sequenceDiagram
    participant node
    participant provider
    Note over node,provider: the provider starts
    Note over provider: ProviderReady
    participant c1_1 as consumer 1
    c1_1->>provider: connects (uid 0)
    c1_1->>provider: NamespaceRequest a Pid Net
    provider->>node: CreateNamespaces a
    node->>provider: NamespacesCreated a
    provider->>node: Watch a
    provider->>c1_1: NamespaceResponse a Pid Net
    provider->>node: RecordHandoff a
    node->>provider: ScopePopulated a
    c1_1->>provider: NamespaceRequest a Net
    provider->>c1_1: CreationFailed: allocation a is alive with another request
    node->>provider: ScopeEmptied a
    provider->>node: ReleaseNamespaces a
    node->>provider: ReleaseDelayed a: pid 3 is stuck#59; #35;1
    Note over provider: RetryDue a
    provider->>node: ReleaseNamespaces a
    node->>provider: NamespacesReleased a
    provider->>c1_1: AllocationEnded a
    c1_1->>provider: AllocationEnded a
    provider->>c1_1: AllocationEnded a
    Note over node,provider: the provider starts
    node->>provider: HandedOffAdopted a
    provider->>node: Watch a
    Note over provider: ProviderReady
    participant c2_1 as consumer 1, start 2
    c2_1->>provider: connects (uid 0)
    c2_1->>provider: NamespaceRequest a Pid Net
    provider->>c2_1: NamespaceResponse a Pid Net
    c2_1--xprovider: is gone: closed
"""


def test_show_draws_what_concerns_an_allocation(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    again = (on.HandedOffAdopted("a", A, MADE), on.ProviderReady(), on.ConnectionOpened(1, 0))
    end = (on.RequestReceived(1, A), on.ResponseSent("a", 1), on.ConnectionLost(1, "closed"))
    path.write_bytes(b"".join([*written(*LIFE), *written(*again, *end)]))
    shown = nshandoff("trace", "show", path, "--allocation", "a")
    assert (shown.returncode, shown.stdout, shown.stderr) == (ExitCode.OK, GOLDEN, "")


def test_show_draws_everything_that_a_kernel_can_meet() -> None:
    events = (
        *LIFE[:3],
        on.ConnectionOpened(3, 0),
        on.FrameRejected("no; frame\n", 3),
        on.RequestReceived(1, A),
        on.NamespacesNotCreated("a", CreationFailed("no <room>")),
        on.ReleaseOverdue("a"),
        on.ProviderStopping(),
    )
    entries = (entry for _, _, entry in read_lines(written(*events)))
    drawn = list(sequence_diagram(entries))
    assert "    c1_2->>provider: connects (uid 7)" in drawn
    assert "    c1_3->>provider: unreadable: no#59; frame#10;" in drawn
    assert "    provider->>c1_2: SocketUnavailable: user 7 may not use this provider" in drawn
    assert "    provider-xc1_2: closes" in drawn
    assert "    node->>provider: NamespacesNotCreated a: no #60;room#62;" in drawn
    assert "    Note over provider: ReleaseOverdue a" in drawn


def test_failure_of_reading_is_said() -> None:
    options = cli._parse(["trace", "check", "/nowhere/trace"])
    with pytest.raises(Failure, match="FileNotFoundError"):
        cli._VERBS["trace"](options)(options)
