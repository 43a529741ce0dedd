"""Finds every clause of the chapters, where the code cites it, and which tests claim it. Pure text.

A clause is a quoted paragraph with an id that stays. Its subject is who has to do it, and it has
exactly one of five key words of BCP 14; outside clauses no key word is used:

    > <a id="WIRE-16"></a>**WIRE-16** A consumer MAY send its next message before ...

Code cites a clause by its id, in a comment or docstring where it is enforced. A test claims it:

    @pytest.mark.clause("WIRE-1")
    def test_...
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
"""The project's folder."""

CHAPTERS: Final = tuple(sorted((ROOT / "specs").glob("[0-9][0-9]-*.md")))
"""The chapters, in reading order."""

LEVELS: Final = re.compile(r"\b(MUST NOT|MUST|SHOULD NOT|SHOULD|MAY)\b")
"""How binding a sentence is: the key words of BCP 14 (RFC 2119, RFC 8174) that are used."""

UNUSED: Final = re.compile(r"\b(SHALL|REQUIRED|RECOMMENDED|OPTIONAL|MAY NOT|NEED NOT)\b")
"""Key words of BCP 14 that are not used, and a form that can be read as two of them."""

ROLES: Final = (
    "provider",
    "consumer",
    "sender",
    "receiver",
    "caller",
    "operator",
    "implementation",
)
"""Who can be obliged; chapter 1 says what each one is."""

ID: Final = re.compile(r"\b[A-Z]+-\d+\b")
"""What looks like a clause's id."""

_SUBJECT: Final = re.compile(
    rf"An? (?:{'|'.join(ROLES)})\b[^.;:]*? {LEVELS.pattern}"
)
_ASIDE: Final = r"(?:,[^,]*,)?"
_CLAUSE_ENDS: Final = (
    r"[,.;:]|\b(?:and|or|that|what|which|who|whose|when|while|where|if|unless|before|after|than|so)\b"
)
_NEGATED: Final = re.compile(
    rf"{LEVELS.pattern}{_ASIDE}(?:(?!{_CLAUSE_ENDS}).)*\b(?:never|not?|none|nothing|nowhere|neither)\b"
)
"""A denial in the main clause after a key word: of what is it then that one is obliged?"""
_FIRST_LINE: Final = re.compile(r'^> <a id="([A-Z]+-\d+)"></a>\*\*([A-Z]+-\d+)\*\* (.*)$')


class Clause(NamedTuple):
    """A normative sentence."""

    id: str
    text: str
    chapter: Path
    line: int

    @property
    def level(self) -> str:
        """Its key word."""
        found = LEVELS.search(self.text)
        return found[0] if found else ""

    @property
    def objections(self) -> list[str]:
        """Why it can be misread, or obliges no one."""
        found = []
        if len(LEVELS.findall(self.text)) != 1:
            found.append("has not exactly one key word")
        if UNUSED.search(self.text):
            found.append("has a key word that is not used here")
        if not _SUBJECT.match(self.text):
            found.append("does not begin with who has to do it and a key word")
        if _NEGATED.search(self.text):
            found.append("denies with another word than NOT after its key word")
        return found

    @property
    def topic(self) -> str:
        """The letters of its id."""
        return self.id.partition("-")[0]


class Place(NamedTuple):
    """Where a clause is cited or claimed."""

    path: Path
    line: int
    name: str
    """The function or class around it; empty at the top of a file."""


def clauses() -> dict[str, Clause]:
    """Read every clause; raises `ValueError` if an id is used twice, or its anchor is another."""
    found: dict[str, Clause] = {}
    for chapter in CHAPTERS:
        for clause in clauses_of(chapter):
            if clause.id in found:
                raise ValueError(f"{clause.id} stands in {found[clause.id].chapter} and {chapter}")
            found[clause.id] = clause
    return found


def clauses_of(chapter: Path) -> Iterator[Clause]:
    """Read the clauses of one chapter, in order."""
    lines = chapter.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        first = _FIRST_LINE.match(line)
        if first is None:
            continue
        if first[1] != first[2]:
            raise ValueError(f"{chapter}:{number}: the anchor of {first[2]} is {first[1]}")
        rest = []
        for following in lines[number:]:
            if not following.startswith("> ") or _FIRST_LINE.match(following):
                break
            rest.append(following.removeprefix("> "))
        yield Clause(first[1], " ".join([first[3], *rest]), chapter, number)


def claims() -> dict[str, list[Place]]:
    """Find which tests claim which clause."""
    found: dict[str, list[Place]] = {}
    suites = ((ROOT / "tests").rglob("test_*.py"), ROOT.glob("*/testing/**/*.py"))
    for path in sorted(path for found in suites for path in found):
        for node, name in _named(ast.parse(path.read_text(encoding="utf-8"))):
            for clause in _marked(node):
                found.setdefault(clause, []).append(Place(path, node.lineno, name))
    return found


def citations() -> dict[str, list[Place]]:
    """Find where the packages cite clauses; anything with a clause's topic is taken for one."""
    topics = {clause.topic for clause in clauses().values()}
    found: dict[str, list[Place]] = {}
    for package in ("statemachine", "transport", "linux"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.is_relative_to(ROOT / package / "testing"):
                continue
            text = path.read_text(encoding="utf-8")
            names = _names_by_line(ast.parse(text), text.count("\n") + 2)
            for number, line in enumerate(text.splitlines(), 1):
                for word in ID.findall(line):
                    if word.partition("-")[0] in topics:
                        found.setdefault(word, []).append(Place(path, number, names[number]))
    return found


def _named(tree: ast.AST, prefix: str = "") -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            yield node, name
            yield from _named(node, f"{name}.")


def _marked(node: ast.stmt) -> Iterator[str]:
    """Yield what `@pytest.mark.clause(...)` and the case's id say above a definition."""
    for decorator in getattr(node, "decorator_list", []):
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.clause":
            yield from (ast.literal_eval(argument) for argument in decorator.args)
        elif isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("case", "cases"):
            yield ast.literal_eval(decorator.args[0]).partition("/")[0]


def _names_by_line(tree: ast.Module, lines: int) -> list[str]:
    names = [""] * (lines + 1)
    for node, name in _named(tree):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            names[number] = name
    return names
