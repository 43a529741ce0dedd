"""The reference model judges traces: ours, changed ones, and one that no kernel of ours wrote."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, get_args

import pytest

from linux.cli.exits import ExitCode
from specs import model
from specs._build.clauses import clauses
from statemachine import effects as do
from statemachine import events as on
from statemachine.errors import FdPassing
from statemachine.events import Event, ProviderInput
from statemachine.messages import NamespaceResponse
from statemachine.provider import ProviderKernel
from statemachine.testing.lockstep import LIMITS, MODEL_LIMITS, provider_events, response_to
from tests.support.programs import NET, PID, nshandoff
from tests.transport.test_trace import (
    INVENTED,
    LIFE,
    MADE,
    RESTART,
    A,
    line_of,
    numbered,
    written,
)
from transport.testing.model_judge import FREE, ModelJudge
from transport.trace import Start, TraceEntry, Turn, decode_line, encode_line, read_lines
from transport.trace.check import ImpossibleLine, Judge, KernelJudge, Replay
from transport.trace.clauses import OF_EFFECTS, OF_EVENTS, ORDER

BOTH: Final = pytest.mark.parametrize("judge", [KernelJudge, ModelJudge])


def refused(lines: list[bytes], judge: type[Judge] = ModelJudge) -> ImpossibleLine:
    with pytest.raises(ImpossibleLine) as refusal:
        Replay(judge).take_all(lines)
    assert set(refusal.value.clauses) <= set(clauses())
    return refusal.value


# --- Our own ----------------------------------------------------------------------------------


def test_basic_lives_of_ours_are_possible_by_the_model() -> None:
    lives = (LIFE[:8], (*RESTART, on.EndReceived(1, "a"), on.NamespacesReleased("a")), LIFE)
    replay = Replay(ModelJudge)
    replay.take_all([line for life in lives for line in written(*life)])
    assert (replay.starts, replay.gaps, replay.turns) == (3, 0, sum(map(len, lives)))


@pytest.mark.parametrize("seed", range(20))
def test_random_lives_of_ours_are_possible_by_the_model(seed: int) -> None:
    rng, kernel, state = random.Random(seed), ProviderKernel(LIMITS), model.Provider(MODEL_LIMITS)
    lines = [encode_line(0, Start(LIMITS))]
    events: list[Any] = [e for e in provider_events("ab") if isinstance(e, get_args(ProviderInput))]
    for _ in range(2_000):
        event = rng.choice(events)
        if isinstance(event, on.NamespacesCreated) and _is_of_another(state, event):
            continue
        with suppress(model.Impossible):
            state, _ = model.provider_step(state, event)
            lines.append(encode_line(len(lines), Turn(event, kernel.receive(event))))
    for judge in (KernelJudge, ModelJudge):
        replay = Replay(judge)
        replay.take_all(lines)
        assert replay.turns == len(lines) - 1 > 50


def _is_of_another(state: model.Provider, event: on.NamespacesCreated) -> bool:
    allocation = state.allocations.get(event.allocation_id)
    return allocation is None or response_to(allocation.request) != event.response


# --- Changed lines ----------------------------------------------------------------------------


def demanded_effects() -> Iterator[tuple[int, int]]:
    """Lines, and the places in them of effects that no trace may be without."""
    for number, _, entry in read_lines(written(*LIFE)):
        for place, effect in enumerate(entry.effects if isinstance(entry, Turn) else ()):
            if not isinstance(effect, FREE):
                yield number, place


def with_effects_at(number: int, effects: tuple[do.Effect, ...]) -> list[bytes]:
    lines = written(*LIFE)
    sequence, entry = decode_line(number, lines[number - 1])
    assert isinstance(entry, Turn)
    lines[number - 1] = encode_line(sequence, Turn(entry.event, effects))
    return lines


def effects_of(number: int) -> tuple[do.Effect, ...]:
    _, entry = decode_line(number, written(*LIFE)[number - 1])
    assert isinstance(entry, Turn)
    return entry.effects


CHANGED: Final = {
    do.CreateNamespaces: "LIFE-3",
    do.HandOver: "LIFE-3",
    do.AnnounceEnd: "END-12",
    do.CloseConnection: "WIRE-11",
    do.ReleaseNamespaces: "END-10",
    do.Refuse: {"CreationFailed": "LIFE-5", "SocketUnavailable": "ERR-3"},
}


@BOTH
@pytest.mark.parametrize(("at", "place"), list(demanded_effects()))
@pytest.mark.parametrize("change", ["left out", "twice", "for another"])
def test_a_changed_effect_is_refused_with_its_line_and_clause(
    at: int, place: int, change: str, judge: type[Judge]
) -> None:
    before = effects_of(at)
    one = before[place]
    other = do.Refuse(9, FdPassing("never said"))
    instead = {"left out": (), "twice": (one, one), "for another": (other,)}[change]
    found = refused(with_effects_at(at, (*before[:place], *instead, *before[place + 1 :])), judge)
    clause: Any = CHANGED.get(type(one), "END-13")
    if isinstance(one, do.Refuse):
        clause = {"AllocationNotFound": "END-13", **CHANGED[do.Refuse]}[type(one.error).__name__]  # type: ignore[dict-item]
    assert (found.line, "has other effects" in found.reason) == (at, True)
    assert clause in found.clauses


@BOTH
@pytest.mark.parametrize(("after", "event", "says", "allowed"), INVENTED)
def test_an_invented_event_is_refused_with_its_line_and_clause(
    after: type[Event], event: Any, says: str, allowed: str, judge: type[Judge]
) -> None:
    entries: list[TraceEntry] = [entry for _, _, entry in read_lines(written(*LIFE))]
    at = line_of(after) + 1
    entries.insert(at - 1, Turn(event, ()))
    found = refused(numbered(*entries), judge)
    assert found.line == at
    assert {"LIFE-1", *OF_EVENTS[type(event)]} == set(found.clauses)
    assert allowed in found.instead[0]


def test_the_order_on_a_connection_counts_and_no_other() -> None:
    two = (*LIFE[:5], on.RequestReceived(1, A), on.EndReceived(1, "b"))
    lines = written(*two, on.NamespacesCreated("a", MADE))
    sequence, entry = decode_line(len(lines), lines[-1])
    assert isinstance(entry, Turn)
    spoken = [effect for effect in entry.effects if not isinstance(effect, FREE)]
    assert [type(effect) for effect in spoken] == [do.HandOver, do.HandOver, do.Refuse]

    def in_the_order(*effects: do.Effect) -> list[bytes]:
        return [*lines[:-1], encode_line(sequence, Turn(entry.event, effects))]  # type: ignore[union-attr]

    work = [effect for effect in entry.effects if isinstance(effect, FREE)]
    Replay(ModelJudge).take_all(in_the_order(*spoken, *work))
    Replay(ModelJudge).take_all(in_the_order(*work, *spoken))
    found = refused(in_the_order(*work, *reversed(spoken)))
    assert (found.line, found.clauses) == (len(lines), ORDER)


def test_a_response_that_does_not_answer_its_request_is_refused() -> None:
    turned = NamespaceResponse("a", (NET, PID), None)
    lines = written(*LIFE[:5], on.NamespacesCreated("a", turned))
    found = refused(lines)
    assert (found.line, found.clauses) == (len(lines), ("FD-2",))


@BOTH
def test_what_a_crash_cannot_leave_is_refused_with_its_clause(judge: type[Judge]) -> None:
    before, lost = written(*LIFE[:8]), written(on.ProviderReady())
    assert refused([*before, *lost], judge).clauses == ("CRASH-2",)
    ended = [*LIFE[:10], on.ReleaseOverdue("a")]
    alive = written(on.CreatedAdopted("a", A, MADE))
    assert refused([*written(*ended), *alive], judge).clauses == ("CRASH-5",)


# --- A foreign one ----------------------------------------------------------------------------

FOREIGN: Final = """\
{"start": {"limits": {"remembered": 9, "connections_per_uid": 9, "allocations_per_uid": 9,
 "open_per_uid": 9, "open_per_connection": 9, "waiting": 9, "allowed_uids": [1000]}}}
{"event": {"ConnectionOpened": {"uid": 1000, "connection": 40}}, "effects": []}
{"event": {"ConnectionOpened": {"uid": 0, "connection": 41}}, "effects":
 [{"Refuse": {"connection": 41, "error": {"SocketUnavailable": "go away"}}},
  {"CloseConnection": {"connection": 41}}]}
{"event": {"ProviderReady": {}}, "effects": []}
{"event": {"RequestReceived": {"request": {"allocation_id": "job", "namespaces": ["Net"],
 "uenv_image": null}, "connection": 40}}, "effects": [{"CreateNamespaces": {"request":
 {"allocation_id": "job", "namespaces": ["Net"], "uenv_image": null}}}]}
{"event": {"RequestReceived": {"request": {"allocation_id": "job", "namespaces": [],
 "uenv_image": null}, "connection": 40}}, "effects": []}
{"event": {"NamespacesCreated": {"allocation_id": "job", "response": {"allocation_id": "job",
 "fd_types": ["Net"], "uenv_mount_path": null}}}, "effects":
 [{"HandOver": {"connection": 40, "response": {"allocation_id": "job", "fd_types": ["Net"],
  "uenv_mount_path": null}}},
  {"Refuse": {"connection": 40, "error": {"CreationFailed": "the name is taken"}}}]}
{"event": {"ResponseSent": {"connection": 40, "allocation_id": "job"}}, "effects": []}
{"event": {"ScopePopulated": {"allocation_id": "job"}}, "effects": []}
{"event": {"ScopeEmptied": {"allocation_id": "job"}}, "effects":
 [{"ReleaseNamespaces": {"allocation_id": "job"}}]}
{"event": {"NamespacesReleased": {"allocation_id": "job"}}, "effects":
 [{"AnnounceEnd": {"connection": 40, "allocation_id": "job"}}]}
"""
"""As another implementation would write it: no timers, reasons of its own, keys in any order."""


def foreign() -> list[dict[str, Any]]:
    plain, rest = [], FOREIGN.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        plain.append({**value, "seq": len(plain), "schema": 1})
        rest = rest[end:].lstrip()
    return plain


def as_lines(plain: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(each).encode() + b"\n" for each in plain]


def test_basic_a_foreign_trace_is_possible_by_the_model_and_not_by_our_kernel() -> None:
    replay = Replay(ModelJudge)
    replay.take_all(as_lines(foreign()))
    assert (replay.turns, replay.starts, replay.gaps) == (10, 1, 0)
    assert refused(as_lines(foreign()), KernelJudge).line == 3


@pytest.mark.parametrize("at", [i for i, each in enumerate(foreign()) if each.get("effects")])
def test_a_foreign_trace_without_an_effect_is_refused(at: int) -> None:
    for place in range(len(foreign()[at]["effects"])):
        plain = foreign()
        del plain[at]["effects"][place]
        found = refused(as_lines(plain))
        assert found.line == at + 1
        assert found.clauses


def test_an_effect_that_may_be_left_out_must_be_right_where_it_is() -> None:
    plain = foreign()
    plain[7]["effects"] = [{"RecordHandoff": {"allocation_id": "job"}}]
    plain[9]["effects"].append({"StartTimer": {"timer": "release", "allocation_id": "job"}})
    Replay(ModelJudge).take_all(as_lines(plain))
    plain[8]["effects"] = [{"StartTimer": {"timer": "claim", "allocation_id": "job"}}]
    assert (refused(as_lines(plain)).line, refused(as_lines(plain)).clauses) == (9, ("END-3",))


def test_a_timer_that_is_not_written_down_may_run_out() -> None:
    plain = foreign()
    late = {"event": {"ReleaseOverdue": {"allocation_id": "job"}}, "schema": 1, "seq": 10}
    end = plain[10]["effects"]
    plain[10:] = [{**late, "effects": end}, {**plain[10], "seq": 11, "effects": []}]
    Replay(ModelJudge).take_all(as_lines(plain))
    plain.insert(11, {**late, "seq": 11, "effects": []})
    plain[12]["seq"] = 12
    assert refused(as_lines(plain)).clauses == ("LIFE-1", "END-9")


# --- Clauses ----------------------------------------------------------------------------------


def test_everything_that_can_be_refused_has_a_clause_and_each_is_in_the_book() -> None:
    assert set(OF_EVENTS) == set(get_args(ProviderInput))
    named = {clause for said in (*OF_EVENTS.values(), *OF_EFFECTS.values()) for clause in said}
    assert named - set(clauses()) == set()


# --- The command ------------------------------------------------------------------------------


def test_the_command_has_a_trace_judged_as_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"".join(as_lines(foreign())))
    by_model = nshandoff("trace", "check", "--by", "model", path)
    assert (by_model.returncode, by_model.stderr) == (ExitCode.OK, "")
    assert by_model.stdout == f"{path}: possible by the model: 10 events, 1 starts, 0 gaps\n"
    by_both = nshandoff("trace", "check", "--by", "both", path)
    assert by_both.returncode == ExitCode.NO
    assert by_both.stdout.startswith(f"{path}:3: ConnectionOpened has other effects (ERR-3)\n")
    assert by_both.stdout.endswith(by_model.stdout)
    by_kernel = nshandoff("trace", "check", path)
    assert (by_kernel.returncode, by_kernel.stdout) == (
        ExitCode.NO,
        by_both.stdout.removesuffix(by_model.stdout),
    )


@pytest.mark.parametrize("by", ["model", "both"])
def test_a_trace_that_cannot_be_read_is_a_failure_of_the_environment(
    by: str, tmp_path: Path
) -> None:
    absent = nshandoff("trace", "check", "--by", by, tmp_path / "absent")
    assert (absent.returncode, absent.stdout) == (ExitCode.ENVIRONMENT, "")
    assert "FileNotFoundError" in absent.stderr
