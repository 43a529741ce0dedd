"""Writes the generated parts of the documents anew: `python -m specs._build.refresh`.

A generated part stands between `<!-- generated: <how> <of what> -->` and `<!-- end -->`:

    mermaid, markdown   a table of `statemachine.lifecycle`, as a diagram or row by row
    guards              conditions of events besides their rows
    recovery            the table of `linux.recovery`, row by row
    invariants          those proved of a table, what they rest on, and what breaks them
    sequence            a scenario as a sequence diagram: what befalls whom, messages, states

What is long, and shown elsewhere in the repository, is made for the site only, in the place of
`<!-- on the site: <how> <of what> -->`:

    module              a module of this folder as a chapter: its headings, its words, its code
    clauses             every clause, where the code cites it and which tests claim it
    api                 every public name of a package

The pictures in `pictures/` and the vectors in `vectors/` are written as well.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Final

from linux import recovery
from specs._build import api, clauses, make_vectors, pictures
from statemachine import drawing, lifecycle
from statemachine.effects import Order, Timing
from statemachine.provider import ProviderKernel
from statemachine.provider.kernel import _check
from statemachine.provider.state import State
from statemachine.testing.induction import allocation, variants

ROOT: Final = Path(__file__).resolve().parents[2]
"""The project's folder."""

DOCUMENTS: Final = (ROOT / "README.md", *sorted((ROOT / "specs").rglob("*.md")))
"""The documents that may have generated parts."""

_PART: Final = re.compile(r"<!-- generated: (\w+) ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
_SITE_PART: Final = re.compile(r"^<!-- on the site: (\w+) (\w+) -->$", re.MULTILINE)
_HEADING: Final = re.compile(r"^# --- (.*?) -+$", re.MULTILINE)


def refreshed(text: str) -> str:
    """Return a document's text with every generated part made anew."""
    return _PART.sub(_part, text)


def for_site(text: str) -> str:
    """Return a document's text with the parts that only the site has."""
    return _SITE_PART.sub(lambda match: _MAKERS[match[1]](match[2]).strip(), text)


def _part(match: re.Match[str]) -> str:
    how, what = match.groups()
    return f"<!-- generated: {how} {what} -->\n\n{_MAKERS[how](what).strip()}\n\n<!-- end -->"


def _mermaid(table: str) -> str:
    return f"```mermaid\n{drawing.mermaid(getattr(lifecycle, table))}```"


def _markdown(table: str) -> str:
    return drawing.markdown(getattr(lifecycle, table))


def _recovery(_: str) -> str:
    """Show each row of the table of recovery, in the words of its facts."""
    lines = ["| journal | init | scope | verdict | action | why |", "|---|---|---|---|---|---|"]
    for row in recovery.ROWS:
        columns = [
            _facts(recovery.Store, row.store),
            _facts(recovery.Init, row.init),
            _facts(recovery.ScopeSeen, row.scope),
        ]
        cells = [*columns, row.verdict.value, row.action.value, row.why]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _facts(kind: type[Enum], facts: tuple[Enum, ...]) -> str:
    """List the facts of one column; those left out, where they are fewer."""
    left_out = [each.value for each in kind if each not in facts]
    if not left_out:
        return "any"
    if len(left_out) == 1:
        return f"any but *{left_out[0]}*"
    return " or ".join(f"*{each.value}*" for each in facts)


def _guards(listed: str) -> str:
    return drawing.guards(getattr(lifecycle, listed))


def _invariants(_: str) -> str:
    """Show each invariant of the allocation's relation, and a variant that breaks it."""
    relation = allocation.relation_of()
    touched = [transition.changed for transition in relation.transitions if transition.is_made]
    lines = ["| invariant | | obligations | broken by | code |", "|---|---|---|---|---|"]
    for each in allocation.INVARIANTS:
        own = each.names(relation)
        count = sum(not own.isdisjoint(changed) for changed in touched)
        of_clauses = f" ({', '.join(each.clauses)})" if each.clauses else ""
        shown = next(v for v in variants.variants() if v.breaks == each.name)
        code = _code_of(shown.concerns)
        lines.append(f"| {each.name} | {each.says}{of_clauses} | {count} | {shown.says} | {code} |")
    return "\n".join(lines)


def _code_of(concerned: Order | lifecycle.Guard | None) -> str:
    """Name the function that a variant leaves out; without one, it is the row."""
    if concerned is None:
        return "the row"
    if isinstance(concerned, lifecycle.Guard):
        function: Callable[..., object] = _check
    elif isinstance(concerned, Timing):
        function = State.time
    else:
        function = ProviderKernel.orders[concerned]
    return f"`{function.__module__.rpartition('.')[2]}.{function.__qualname__}`"


def _sequence(scenario: str) -> str:
    text = (ROOT / "specs" / "scenarios" / f"{scenario}.md").read_text(encoding="utf-8")
    lines = [f"    participant {each}" for each in ("first as consumer", "provider", "node")]
    for line in text.partition("```scenario\n")[2].partition("```")[0].splitlines():
        if line.startswith("> "):
            who = next((each for each in ("first", "provider") if each in line), "node")
            lines.append(f"    Note over {who}: {line[2:].replace('first', 'the consumer')}")
        elif arrow := re.fullmatch(r"(\w+) → (\w+) +(.*)", line):
            lines.append(f"    {arrow[1]}->>{arrow[2]}: {arrow[3]}")
        elif states := re.fullmatch(r"(job-\d+) +(.* → .*)", line):
            lines.append(f"    Note over provider: {states[1]}: {states[2]}")
    return "\n".join(["```mermaid", "sequenceDiagram", *lines, "```"])


def _module(name: str) -> str:
    """Show a module as a chapter: what it says of itself, and its code under its own headings."""
    source = (ROOT / "specs" / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    words = ast.get_docstring(tree) or ""
    code = "".join(source.splitlines(keepends=True)[tree.body[0].end_lineno :])
    first, *rest = _HEADING.split(code)
    shown = [words, _block(first)]
    for heading, body in zip(rest[::2], rest[1::2], strict=True):
        shown += [f"## {heading}", _block(body)]
    return "\n\n".join(shown)


def _block(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _index(_: str) -> str:
    """List the clauses of each chapter; links lead to the lines."""
    claims, citations = clauses.claims(), clauses.citations()
    lines: list[str] = []
    for chapter in clauses.CHAPTERS:
        found = list(clauses.clauses_of(chapter))
        if found:
            title = chapter.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            lines += ["", f"## {title}", "", "| clause | | code | tests |", "|---|---|---|---|"]
        for clause in found:
            anchor = f"[{clause.id}]({chapter.name}#{clause.id})"
            code = _places(citations.get(clause.id, []))
            lines.append(
                f"| {anchor} | {clause.level} | {code} | {_places(claims.get(clause.id, []))} |"
            )
    return "\n".join(lines)


def _places(places: list[clauses.Place]) -> str:
    """Link each place once, under the name of what stands there."""
    links: dict[tuple[str, str], str] = {}
    for place in places:
        name = f"{place.path.stem}.{place.name}".rstrip(".")
        target = os.path.relpath(place.path, ROOT / "specs")
        links.setdefault((name, target), f"[{name}]({target})")
    return ", ".join(links.values())


_MAKERS: Final[dict[str, Callable[[str], str]]] = {
    "mermaid": _mermaid,
    "markdown": _markdown,
    "guards": _guards,
    "recovery": _recovery,
    "invariants": _invariants,
    "sequence": _sequence,
    "module": _module,
    "clauses": _index,
    "api": api.reference,
}


def main() -> int:
    """Rewrite what is stale and name it."""
    for path in (*make_vectors.write(), *pictures.write()):
        print(f"refreshed {path.relative_to(ROOT)}")
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        fresh = refreshed(text)
        if fresh != text:
            document.write_text(fresh, encoding="utf-8")
            print(f"refreshed {document.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
