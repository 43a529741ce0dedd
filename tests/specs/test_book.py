"""Nothing in the chapters is false: every block runs, and every block can fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil.example import SybilFailure

from specs._build.clauses import CHAPTERS
from tests.specs import book
from tests.support.census import Census

NAMES = [chapter.name for chapter in CHAPTERS]
HERE = [chapter for chapter in CHAPTERS if chapter.name != "11-certifying.md"]
"""Those that run in this tree; chapter 11 runs in `test_packaging`, where only the wheel is."""


@pytest.mark.needs_root
@pytest.mark.parametrize("chapter", HERE, ids=lambda chapter: chapter.name)
def test_every_block_of_a_chapter_runs(chapter: Path, census: Census) -> None:
    count = book.run(chapter)
    fences = re.findall(r"^```(python|hex|console)$", chapter.read_text("utf-8"), re.MULTILINE)
    assert count >= len(fences)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=NAMES)
def test_there_is_no_block_that_is_not_run(chapter: Path) -> None:
    assert book.objections(chapter) == []


FRAME = "00 00 00 22  length\n81 af 41 6c 6c 6f 63 61 74 69 6f 6e 45 6e 64 65 64\n"
PAYLOAD = "81 ad 61 6c 6c 6f 63 61 74 69 6f 6e 5f 69 64  a map\na1 61  its value\n"


def chapter_of(tmp_path: Path, kind: str, block: str) -> Path:
    chapter = tmp_path / "chapter.md"
    chapter.write_text(f"# T\n\n```{kind}\n{block}```\n", encoding="utf-8")
    return chapter


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("python", ">>> 1 + 1\n2\n"),
        ("hex", FRAME + PAYLOAD + '= AllocationEnded("a")\n'),
        ("console", "$ echo one; for i in 2 3\n> do echo $i; done\none\n…\n$ true\n"),
        ("console", "$ echo one two three\none … three\n$ sleep 1000 &\n"),
    ],
)
def test_a_block_that_is_true_runs(tmp_path: Path, kind: str, block: str) -> None:
    assert book.run(chapter_of(tmp_path, kind, block)) == 1


@pytest.mark.parametrize(
    ("kind", "block", "says"),
    [
        ("python", ">>> 1 + 1\n3\n", "Got:\n    2"),
        ("hex", FRAME + PAYLOAD + '= AllocationEnded("b")\n', "AllocationEnded"),
        ("hex", FRAME + '= AllocationEnded("a")\n', "not the bytes of one frame"),
        ("hex", FRAME + PAYLOAD, "not the bytes of one frame"),
        ("console", "$ echo one\ntwo\n", "says\none"),
        ("console", "$ echo one\n", "says\none"),
        ("console", "$ true\none\n", "and not\none"),
    ],
)
def test_a_block_that_is_false_is_found_out(
    tmp_path: Path, kind: str, block: str, says: str
) -> None:
    with pytest.raises(SybilFailure) as failure:
        book.run(chapter_of(tmp_path, kind, block))
    assert says in str(failure.value)


def test_a_shell_that_ends_or_hangs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EOFError):
        book.run(chapter_of(tmp_path, "console", "$ exit\n"))
    monkeypatch.setattr(book, "COMMAND_TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError):
        book.run(chapter_of(tmp_path, "console", "$ sleep 1000\n"))


def test_blocks_that_are_not_run_are_named(tmp_path: Path) -> None:
    assert book.objections(chapter_of(tmp_path, "rust", "fn main() {}\n")) == [
        "a block of 'rust' cannot be run"
    ]
    drawn = book.objections(chapter_of(tmp_path, "mermaid", "stateDiagram\n"))
    assert drawn == ["a diagram that is not drawn from the code"]
