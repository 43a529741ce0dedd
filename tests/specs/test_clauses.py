"""Every normative sentence is a clause, is claimed by a test, and is cited where it is enforced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specs._build import clauses as book
from specs._build.clauses import CHAPTERS, LEVELS, UNUSED, Clause

SPECS = book.ROOT / "specs"
CLAUSES = book.clauses()
CLAIMS = book.claims()
CITATIONS = book.citations()


def test_there_are_clauses_in_every_topic() -> None:
    assert len({clause.topic for clause in CLAUSES.values()}) >= 8
    assert len(CLAUSES) >= 100


@pytest.mark.parametrize("clause", CLAUSES.values(), ids=CLAUSES)
def test_a_clause_obliges_one_role_is_tested_and_is_cited(clause: Clause) -> None:
    assert clause.objections == []
    assert CLAIMS.get(clause.id), f"no test claims {clause.id}: {clause.text}"
    assert CITATIONS.get(clause.id), f"no code cites {clause.id}: {clause.text}"


def test_a_claim_has_its_clause() -> None:
    assert {name: places for name, places in CLAIMS.items() if name not in CLAUSES} == {}


def test_a_citation_has_its_clause() -> None:
    assert {name: places for name, places in CITATIONS.items() if name not in CLAUSES} == {}


@pytest.mark.parametrize("name", ["model.py", "invariants.py"])
def test_the_model_and_the_invariants_cite_clauses(name: str) -> None:
    cited = set(book.ID.findall((SPECS / name).read_text(encoding="utf-8")))

    assert len(cited) > 10
    assert cited - set(CLAUSES) == set()


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_a_chapter_is_normative_only_in_its_clauses(chapter: Path) -> None:
    text = chapter.read_text(encoding="utf-8")
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("> "))
    drawn_or_code = r"<!-- generated.*?<!-- end -->|```.*?```|`[^`]*`"
    left = re.sub(drawn_or_code, "", prose, flags=re.DOTALL)
    assert LEVELS.findall(left) + UNUSED.findall(left) == []


def test_the_numbers_of_a_topic_have_no_holes_and_ascend_in_the_chapters() -> None:
    numbers: dict[str, list[int]] = {}
    for clause in CLAUSES.values():
        numbers.setdefault(clause.topic, []).append(int(clause.id.rpartition("-")[2]))
    assert {t: n for t, n in numbers.items() if n != list(range(1, len(n) + 1))} == {}


# --- The finding itself can fail ---------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one chapter, one module and one test."""
    chapter = tmp_path / "specs" / "01-one.md"
    for folder in ("specs", "tests", "statemachine", "transport", "linux"):
        (tmp_path / folder).mkdir()
    clause = '> <a id="T-1"></a>**T-1** A sender MUST\n> be.\n>\n> More.\n'
    chapter.write_text(clause, "utf-8")
    code = "class K:\n    def f(self):\n        # T-1, and UTF-8.\n        T_2 = 'T-2'\n"
    (tmp_path / "linux" / "code.py").write_text(code)
    claim = "import pytest\n@pytest.mark.clause('T-1', 'T-3')\ndef test_it(): ...\n"
    (tmp_path / "tests" / "test_one.py").write_text(claim)
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "CHAPTERS", (chapter,))
    return tmp_path


def test_clauses_claims_and_citations_are_found_where_they_are(tree: Path) -> None:
    (clause,) = book.clauses().values()
    assert (clause.id, clause.text, clause.line) == ("T-1", "A sender MUST be.", 1)
    assert (clause.level, clause.objections) == ("MUST", [])
    assert [place.name for place in book.claims()["T-3"]] == ["test_it"]
    assert {c: (p[0].line, p[0].name) for c, p in book.citations().items()} == {
        "T-1": (3, "K.f"),
        "T-2": (4, "K.f"),
    }


@pytest.mark.parametrize(
    "second", ['> <a id="T-1"></a>**T-1** Again.\n', '> <a id="T-2"></a>**T-3** Other.\n']
)
def test_an_id_that_is_not_its_own_is_refused(tree: Path, second: str) -> None:
    chapter = book.CHAPTERS[0]
    chapter.write_text(chapter.read_text("utf-8") + second, "utf-8")
    with pytest.raises(ValueError, match=r"T-1 stands in|the anchor of T-3 is T-2"):
        book.clauses()


@pytest.mark.parametrize(
    "text",
    [
        # Where no role is obliged, or it is not said who.
        "Nothing MUST be killed in a cgroup whose owner is not proved.",
        "No peer MUST make another one wait.",
        "Nobody MUST be told twice.",
        "Neither side MUST wait.",
        "There MUST never be two live sets.",
        "The socket MUST be open to its owner alone.",
        "It MUST be closed.",
        "MUST be closed.",
        "A frame that cannot be read MUST be answered.",
        "A provider listens; the socket MUST be private.",
        # What could be an obligation or none.
        "A provider MUST never wait.",
        "A provider MUST not wait.",
        "A provider SHOULD never wait.",
        "A provider MAY NOT wait.",
        "A provider MAY not wait.",
        "A provider NEED NOT wait.",
        "A provider NEED NOT MUST wait.",
        "A provider MUST, then, never wait.",
        "A provider MUST under no circumstances wait.",
        "A provider MUST in its own time never wait.",
        "A provider MUST kill nothing that is not its own.",
        "A provider MUST give two users neither the same id nor the same scope.",
        "A consumer MUST run no code of its own.",
        "A consumer SHOULD leave none of its processes behind.",
        "A consumer MUST NOT never wait.",
        # None, two, or another key word.
        "A provider waits.",
        "A provider MUST wait and SHOULD hurry.",
        "A provider SHALL wait.",
        "A provider MUST wait; a deadline is RECOMMENDED.",
    ],
)
def test_a_clause_that_can_be_misread_is_refused(text: str) -> None:
    assert Clause("T-1", text, Path("x.md"), 1).objections != []


@pytest.mark.parametrize(
    "text",
    [
        "A provider MUST wait, and not hurry.",
        "A provider MUST refuse what has no row, or not begin.",
        "A provider MUST, if it is not ready, wait.",
        "A provider MUST NOT change anything when nothing was asked.",
    ],
)
def test_what_else_is_denied_than_the_obligation_can_be_said(text: str) -> None:
    assert Clause("T-1", text, Path("x.md"), 1).objections == []


@pytest.mark.parametrize("level", ["MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY"])
def test_each_of_the_five_key_words_is_taken(level: str) -> None:
    clause = Clause("T-1", f"A consumer that waits {level} end.", Path("x.md"), 1)

    assert (clause.objections, clause.level) == ([], level)
