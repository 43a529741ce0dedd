"""The documents say what the code says: generated parts are fresh, examples run, links lead."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "specs"))

import refresh  # noqa: E402

DOCUMENTS = [*refresh.DOCUMENTS, ROOT / "CONTRIBUTING.md"]
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_generated_parts_are_fresh(document: Path) -> None:
    text = document.read_text(encoding="utf-8")

    assert refresh.refreshed(text) == text, "run: python specs/refresh.py"


def test_a_stale_part_is_noticed() -> None:
    stale = "<!-- generated: mermaid NOTICE -->\nsomething else\n<!-- end -->"

    assert refresh.refreshed(stale) != stale
    assert "silent --> told" in refresh.refreshed(stale)


def test_the_provider_table_is_drawn_in_both_ways() -> None:
    drawn = [
        match
        for document in refresh.DOCUMENTS
        for match in re.findall(r"generated: (\w+) PROVIDER", document.read_text(encoding="utf-8"))
    ]

    assert sorted(drawn) == ["markdown", "mermaid", "mermaid"]


def test_the_example_of_the_readme_runs_as_it_stands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None

    ran = subprocess.run(
        [sys.executable, "-c", example[1]], capture_output=True, text=True, check=True, cwd="/"
    )

    printed = [line.split("(")[0] for line in ran.stdout.splitlines()]
    assert printed == [
        "CreateNamespaces",
        "Watch",
        "HandOver",
        "RecordHandoff",
        "ReleaseNamespaces",
        "StartTimer",
        "StopTimer",
        "AnnounceEnd",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)

    assert [t for t in targets if not (document.parent / t).exists()] == []
