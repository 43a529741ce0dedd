"""The page says what the outcomes say: all of it, in order, and without anything from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations
from typing import Final
from xml.etree import ElementTree

import pytest

from specs._build.graph import state_graph
from specs._build.sequence import Arrow, NotDrawable, Note, read, sequence
from specs._build.svg import level_of, short
from statemachine import NamespaceRequest, NamespaceResponse, NamespaceType, ProviderKernel
from statemachine import effects as do
from statemachine import events as on
from statemachine.lifecycle import TABLES
from statemachine.provider import Limits
from statemachine.table import Table
from statemachine.testing.explore import Bounds, Counterexample, Explorer
from tests.campaign.outcome import Culprit, Discovery, Outcome
from tests.campaign.report import report
from tests.campaign.report_charts import Bar, Dots, bars, dots, heat_map, stacks
from tests.campaign.report_goals import ADAPTERS, Goal, GoalStatus, goals_of, is_good
from tests.campaign.report_opening import opening_of
from tests.campaign.report_summary import LEGAL, Cell, Summary, number_in, plain, summary_of
from tests.campaign.verify_record import Done, Head
from transport.trace import Start, Turn
from transport.trace.diagram import sequence_diagram

HEAD: Final = Head("fingerprint", 42, "2026-11-22 20:00 UTC", {"kernel": "Linux <6>"})
MISSED: Final[Cell] = ("consumer", "held", "EndWanted")
BEYOND_CELL: Final[Cell] = ("service", "stopping", "ConnectionFlooded")
VOID: Final = frozenset({"meta", "link", "br", "img", "input", "hr"})


def outcomes() -> list[Done]:
    """One campaign, in which one adapter missed a cell and one promise was broken."""
    done = []
    for number, adapter in enumerate(ADAPTERS):
        cells = {" ".join(cell): 3 * number + 1 for cell in sorted(LEGAL)}
        if number == 3:
            del cells[" ".join(MISSED)]
        rows = [{"adapter": adapter, "steps": "1,000"}]
        done.append(of("stateful", adapter, Outcome({"steps": 1000}, {adapter: cells}, rows)))
    rows = [{"space": "full", "worlds": "400,000", "seconds": "50.0", "finished": "yes"}]
    done.append(of("explore", "full", Outcome({"worlds": 400_000}, rows=rows)))
    found = Discovery("<b>broken</b>", "replay(['<&>'])", "sequenceDiagram\nA->>B: <hello>")
    done.append(of("explore", "small", Outcome({"worlds": 10}, discoveries=[found])))
    return done


def of(part: str, name: str, outcome: Outcome, number: int = 0) -> Done:
    return Done(f"{number} {part} {name}", part, name, number, 7, outcome)


class Balanced(HTMLParser):
    """Reads a page, and complains of what does not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return report(HEAD, summary_of(outcomes()))


def test_basic_the_page_is_whole(page: str) -> None:
    reader = Balanced()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert page.startswith("<!DOCTYPE html>\n<html lang=")


def test_nothing_is_fetched(page: str) -> None:
    reader = Balanced()
    reader.feed(page)
    for tag, attributes in reader.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "srcset", "xlink:href"} & set(attributes)
    assert re.findall(r"https?:|//|@import", page) == []
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", page))


def test_a_reader_who_does_not_see_is_told(page: str) -> None:
    reader = Balanced()
    reader.feed(page)
    pictures = [a for tag, a in reader.tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(pictures) >= 7
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert page.count("<table>") == page.count("<caption>") == page.count("<thead>")
    assert all(a.get("scope") == "col" for tag, a in reader.tags if tag == "th")


def test_the_same_outcomes_give_the_same_page(page: str) -> None:
    assert report(HEAD, summary_of(reversed(outcomes()))) == page


def test_what_is_said_is_text_and_never_markup(page: str) -> None:
    assert "&lt;b&gt;broken&lt;/b&gt;" in page
    assert "replay([&#x27;&lt;&amp;&gt;&#x27;])" in page
    assert "Linux &lt;6&gt;" in page
    assert "<b>" not in page


def test_a_campaign_without_outcomes_has_a_page() -> None:
    Balanced().feed(report(HEAD, Summary()))


# --- What is said first ------------------------------------------------------------------------


def test_basic_what_is_missing_comes_first(page: str) -> None:
    lines = re.findall(r'<p class="verdict (\w+)">(.*?)</p>', page)
    assert [colour for colour, _ in lines] == ["bad", "bad"]
    assert lines[0][1].startswith("Not reached: ")
    assert "not measured: " in lines[0][1]
    assert lines[1][1].startswith("1 promise is broken; 1 cells")
    assert page.index("<figure>") < page.index("Goals, and what this campaign reached")


def test_a_part_that_was_not_run_is_named() -> None:
    assert opening_of(Summary(), ["faults", "rates"]).missing.endswith("not run: faults, rates")


def test_what_is_missing_is_no_success() -> None:
    opening = opening_of(summary_of(outcomes()[:3]))
    assert opening.colour == "short"
    assert opening.found == "Of what was run, every promise held"


@pytest.mark.parametrize(
    ("culprit", "says"),
    [
        ("promise", "2 promises are broken"),
        ("simulation", "2 differences between the simulation and Linux"),
        ("campaign", "2 faults of the campaign itself, which may hide others"),
    ],
)
def test_it_is_said_what_is_wrong(culprit: Culprit, says: str) -> None:
    found = [Discovery("t", "s", culprit=culprit)] * 2
    opening = opening_of(summary_of([of("explore", "x", Outcome(discoveries=found))]))
    assert (opening.found, opening.colour) == (says, "bad")


# --- Goals -------------------------------------------------------------------------------------


def test_a_missed_cell_is_a_promise_not_kept() -> None:
    done = [one for one in outcomes() if one.part == "stateful"]
    summary = summary_of(done)
    assert summary.missed == {
        "model": [],
        "kernels": [],
        "simulated": [],
        "linux": [MISSED],
    }
    assert not is_good(summary)
    assert is_good(summary_of(done[:3]))
    verdicts = {goal.figure: goal.verdict for goal in goals_of(summary)}
    assert verdicts["cells hit: kernels"] is GoalStatus.REACHED
    assert verdicts["cells hit: linux"] is GoalStatus.NOT_REACHED


@pytest.mark.parametrize(
    ("adapter", "lacks", "is_kept"),
    [
        ("explorer", BEYOND_CELL, True),
        ("explorer", ("service", "ready", "FrameRejected"), False),
        ("model", ("service", "ready", "FrameRejected"), True),
        ("model", MISSED, False),
    ],
)
def test_each_adapter_is_to_hit_what_is_its_own(adapter: str, lacks: Cell, is_kept: bool) -> None:
    cells = {" ".join(cell): 1 for cell in LEGAL - {lacks}}
    summary = summary_of([of("explore", "full", Outcome({}, {adapter: cells}))])
    assert is_good(summary) == is_kept
    assert summary.unhit == [lacks]


def goal(figure: str, *done: Done) -> Goal:
    return next(goal for goal in goals_of(summary_of(done)) if goal.figure == figure)


def explored(states: int, seconds: float) -> Done:
    row = {"space": "s", "worlds": f"{states:,}", "seconds": f"{seconds}"}
    return of("explore", "s", Outcome(rows=[row]))


@pytest.mark.parametrize(
    ("done", "verdict"),
    [
        ((), GoalStatus.NOT_MEASURED),
        ((explored(200_000, 60.0),), GoalStatus.REACHED),
        ((explored(400_000, 119.0),), GoalStatus.REACHED),
        ((explored(400_000, 121.0),), GoalStatus.NOT_REACHED),
        ((explored(199_999, 1.0),), GoalStatus.NOT_REACHED),
    ],
)
def test_states_are_held_to_their_minute(done: tuple[Done, ...], verdict: GoalStatus) -> None:
    assert goal("distinct worlds: kernels, connections and node", *done).verdict is verdict


@pytest.mark.parametrize(
    ("complete", "verdict"),
    [
        (["yes"], GoalStatus.REACHED),
        (["yes", "no, up to 7"], GoalStatus.NOT_REACHED),
        ([], GoalStatus.NOT_MEASURED),
    ],
)
def test_the_full_space_is_finished_or_not(complete: list[str], verdict: GoalStatus) -> None:
    name = "two consumers, two allocations, two connections, crashes"
    done = [
        of("explore", f"{number}", Outcome(rows=[{"space": name, "worlds": "7", "complete": said}]))
        for number, said in enumerate(complete)
    ]
    this = goal("the space of 2 allocations by 2 connections, with crashes", *done)
    assert this.verdict is verdict


def test_a_rate_is_the_count_of_all_rounds_by_the_time_of_all() -> None:
    name = "events through the kernel"
    done = [
        of("rates", name, Outcome({name: 150_000, f"CPU seconds, {name}": 1.0}), 0),
        of("rates", name, Outcome({name: 50_000, f"CPU seconds, {name}": 1.5}), 1),
    ]
    assert goal(name, *done).reached == "80,000"
    assert goal(name, *done).verdict is GoalStatus.NOT_REACHED
    assert goal(name, done[0]).verdict is GoalStatus.REACHED


def test_numbers_are_read_as_they_are_written() -> None:
    assert [number_in(said) for said in ("1,234", "0.5 s", "12s", "yes", "")] == [
        *(1234.0, 0.5, 12.0),
        *(None, None),
    ]
    assert [plain(1234.0), plain(0.126)] == ["1,234", "0.13"]
    assert [short(n) for n in (0, 7, 999, 1000, 9_949, 12_345, 1_500_000)] == [
        *("0", "7", "999", "1.0k", "9.9k", "12k"),
        "1.5M",
    ]
    assert [level_of(n, 1_000_000) for n in (0, 1, 1_000, 1_000_000)] == [0, 1, 4, 6]


def test_the_pictures_of_the_parts_show_what_their_rows_say() -> None:
    rows = {
        "faults": [
            {"call": "read", "outcomes": "served x 3, served, and told x 1,000"},
            {"call": "read", "outcomes": "served x 2"},
        ],
        "canaries": [{"canary": "a leak", "layer": "explorer", "seconds": "2.5"}],
        "explore": [{"space": "small", "worlds a second": "9,876"}],
        "rates": [{"what": "trace events checked", "a second": "54,321"}],
    }
    done = [of(part, "t", Outcome(rows=r)) for part, r in rows.items()]
    done.append(of("differential", "t", Outcome({"mount programs": 1234})))
    page = report(HEAD, summary_of(done))
    for said in (
        "read, served: 5",
        "read, served, and told: 1,000",
        "1,234</text>",
        "a leak: 2.5 s",
        "9,876 (goal 3,333)",
        "54,321 (goal 50,000)",
    ):
        assert said in page
    figure = "single faults, of calls by documented errnos"
    faults = of("faults", "t", Outcome({"single faults": 7, "single faults there are": 8}))
    assert goal(figure, faults).reached == "87.50%: 7 of 8"
    killed = {"mutants of code elsewhere (all)": 200, "mutants of code elsewhere killed (all)": 191}
    mutants = of("mutants", "t", Outcome(killed))
    assert goal("code mutants killed, elsewhere", mutants).verdict is GoalStatus.REACHED
    assert goal("code mutants killed, in kernels", mutants).verdict is GoalStatus.NOT_MEASURED
    kernels = {name.replace("elsewhere", "in kernels"): n for name, n in killed.items()}
    few = goal("code mutants killed, in kernels", of("mutants", "t", Outcome(kernels)))
    assert few.verdict is GoalStatus.NOT_REACHED
    figures = {name.replace("all", "recorded"): n for name, n in killed.items()}
    figures |= {name.replace("all", "sample"): n // 10 for name, n in killed.items()}
    recorded = goal("code mutants killed, elsewhere", of("mutants", "t", Outcome(figures)))
    assert recorded.verdict is GoalStatus.NOT_MEASURED
    assert recorded.reached == "recorded: 95.50%: 191 of 200; sample: 95.00%: 19 of 20"
    assert goal("table mutants killed", mutants).verdict is GoalStatus.NOT_MEASURED


# --- Pictures ----------------------------------------------------------------------------------


def svg(text: str) -> ElementTree.Element:
    """Read a picture; it is well-formed."""
    return ElementTree.fromstring(text)


def titles(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter("title")]


def test_the_heat_map_has_every_cell_and_marks_the_missed() -> None:
    summary = summary_of(outcomes())
    seen: dict[str, int] = {}
    for table in TABLES:
        picture = svg(heat_map(table, summary.cells))
        for title in titles(picture):
            cell, _, count = title.rpartition(": ")
            seen[f"{table.name} {cell}"] = seen.get(f"{table.name} {cell}", 0) + 1
            assert (count == "missed") <= (cell == "EndWanted in held")
        missed = [r for r in picture.iter("rect") if r.get("class") == "cell missed"]
        assert len(missed) == (table.name == "consumer")
    assert seen == {f"{table} {event} in {state}": 4 for table, state, event in LEGAL}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_state_graph_has_every_row_and_marks_the_missed(table: Table) -> None:
    visits = dict.fromkeys(LEGAL, 10)
    every = svg(state_graph(table, visits))
    said = "\n".join(titles(every))
    for row in table.rows:
        assert f"{row.event.__name__}: 10" in said
    assert not [e for e in every.iter() if "missed" in (e.get("class") or "").split()]
    row = next(row for row in table.rows if row.source is not row.target)
    visits[table.name, str(row.source.value), row.event.__name__] = 0
    missed = svg(state_graph(table, visits))
    assert [e.text for e in missed.iter("text") if e.get("class") == "label missed"] == [
        row.event.__name__
    ]


Box = tuple[float, float, float, float]


def boxes(picture: ElementTree.Element) -> Iterator[Box]:
    for rect in picture.iter("rect"):
        x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        yield x, y, x + w, y + h


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_in_the_state_graph_nothing_lies_over_anything(table: Table) -> None:
    picture = svg(state_graph(table, {}))
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    drawn = list(boxes(picture))
    assert len(drawn) > len(table.states)
    for x1, y1, x2, y2 in drawn:
        assert x1 >= 0
        assert y1 >= 0
        assert x2 <= width
        assert y2 <= height
    for a, b in combinations(drawn, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_bars_show_their_goals() -> None:
    picture = svg(bars("a second", [Bar("fast", 200.0, 100.0), Bar("slow", 50.0, 100.0)]))
    names = [r.get("class") for r in picture.iter("rect")]
    assert names == ["bar", "bar short"]
    assert len([e for e in picture.iter("line") if e.get("class") == "goal"]) == 2
    svg(bars("nothing", [Bar("none", 0.0)]))


def test_dots_are_marked_when_they_come_too_late() -> None:
    picture = svg(dots("seconds", [Dots("a", [0.01, 2.0], 1.0), Dots("b", [0.0], 10.0)]))
    assert [c.get("class") for c in picture.iter("circle")] == ["dot", "dot late", "dot"]
    svg(dots("seconds", []))


def test_stacks_are_as_long_as_their_counts() -> None:
    picture = svg(stacks("calls", {"read": {"served": 3, "refused": 1}, "write": {"served": 2}}))
    bars_drawn = [r for r in picture.iter("rect") if r.find("title") is not None]
    widths = [float(r.attrib["width"]) for r in bars_drawn]
    assert widths == pytest.approx([140.0, 420.0, 280.0])
    svg(stacks("nothing", {}))


# --- Sequence diagrams -------------------------------------------------------------------------


def test_a_counterexample_of_the_explorer_is_drawn() -> None:
    class Mute(ProviderKernel):
        def receive(self, event: on.Event) -> tuple[do.Effect, ...]:
            effects = super().receive(event)
            return tuple(effect for effect in effects if not isinstance(effect, do.AnnounceEnd))

    with pytest.raises(Counterexample) as caught:
        Explorer(Bounds(), provider=Mute, lockstep=False).explore()
    whole = read(caught.value.chart)
    assert list(whole.lanes.values()) == ["consumer 0", "provider", "node"]
    arrows = [step for step in whole.steps if isinstance(step, Arrow)]
    assert [(a.source, a.target) for a in arrows[:1]] == [("C0", "P")]
    assert any(isinstance(step, Note) for step in whole.steps)
    picture = svg(sequence(caught.value.chart))
    words = [element.text for element in picture.iter("text")]
    assert words[:3] == ["consumer 0", "provider", "node"]
    assert "NamespaceRequest(a)" in words
    width = float(picture.attrib["width"])
    assert all(x1 >= 0 and x2 <= width for x1, _, x2, _ in boxes(picture))


def test_a_providers_trace_is_drawn() -> None:
    kernel = ProviderKernel()
    wanted = (NamespaceType.NET,)
    entries = [Start(Limits())]
    for event in (
        on.ProviderReady(),
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, NamespaceRequest("a", wanted)),
        on.NamespacesCreated("a", NamespaceResponse("a", wanted)),
        on.FrameRejected("tro#ub;le <1>", 1),
        on.ConnectionLost(1, "gone"),
    ):
        entries.append(Turn(event, kernel.receive(event)))
    text = "\n".join(sequence_diagram(entries))
    words = [element.text for element in svg(sequence(text)).iter("text")]
    assert "the provider starts" in words
    assert "connects (uid 0)" in words
    assert "unreadable: tro#ub;le <1>" in words


def test_what_is_not_of_the_language_is_refused_and_shown_as_it_is() -> None:
    with pytest.raises(NotDrawable, match="line 2: loop for ever"):
        read("sequenceDiagram\nloop for ever\nend")
    found = Discovery("t", "s", "sequenceDiagram\nloop for ever\nend")
    page = report(HEAD, summary_of([of("p", "t", Outcome(discoveries=[found]))]))
    assert "<pre>sequenceDiagram\nloop for ever\nend</pre>" in page
