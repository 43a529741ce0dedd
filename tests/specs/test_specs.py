"""The documents say what the code says: generated parts are fresh, examples run, links lead."""

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from specs._build import api, refresh
from statemachine import errors, messages, roles

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*refresh.DOCUMENTS, ROOT / "CONTRIBUTING.md"]
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_generated_parts_are_fresh(document: Path) -> None:
    text = document.read_text(encoding="utf-8")

    assert refresh.refreshed(text) == text, "run: python -m specs._build.refresh"


def test_a_stale_part_is_noticed() -> None:
    stale = "<!-- generated: mermaid NOTICE -->\nsomething else\n<!-- end -->"

    assert refresh.refreshed(stale) != stale
    assert "silent --> told" in refresh.refreshed(stale)


def test_the_provider_table_is_drawn_in_both_ways() -> None:
    drawn = [
        match
        for document in refresh.DOCUMENTS
        for match in re.findall(
            r"generated: (\w+) ALLOCATION", document.read_text(encoding="utf-8")
        )
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


def test_the_first_lines_of_the_readme_run_as_they_stand() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"^    (from statemachine .*\n(?:    .*\n)+)", text, re.MULTILINE)
    assert lines is not None
    program = textwrap.dedent(lines[0]) + "print(effects)"

    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )

    assert ran.stdout == "()\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text)

    assert [dead for dead in targets if not leads_somewhere(document, *dead)] == []


def leads_somewhere(document: Path, target: str, fragment: str) -> bool:
    """A file is there, and in it the clause or the heading."""
    path = document.parent / target if target else document
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8") if fragment else ""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    return fragment[1:] in {"", *anchors, *re.findall(r'<a id="([^"]+)">', text)}


# --- The reference -----------------------------------------------------------------------------

PUBLIC = [
    name for package in api.PACKAGES for path in api.modules(package) for name in api.names(path)
]


def test_every_public_name_says_what_there_is_to_know() -> None:
    lacking = {f"{name.module}.{name.name}": api.lacks(name) for name in PUBLIC}

    assert {name: what for name, what in lacking.items() if what} == {}
    assert len(PUBLIC) > 880


@pytest.mark.parametrize(
    ("code", "lacking"),
    [
        ("def f(): ...", "what it means"),
        ("class C:\n    def f(self): ...", "what it means"),
        ("LIMIT = 3", "what it means"),
        ('def f():\n    """Say."""\n    raise ValueError("x")', "what it raises"),
        ('def f(d: Descriptor):\n    """Take."""', "who owns what it takes"),
        ('def f() -> Descriptor:\n    """Give."""', "who owns what it returns"),
    ],
)
def test_what_a_docstring_lacks_is_named(tmp_path: Path, code: str, lacking: str) -> None:
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text(code, encoding="utf-8")
    found = [what for name in api.names(module) for what in api.lacks(name)]

    assert [what for what in found if what.startswith(lacking)] != []


def test_a_docstring_that_lacks_nothing_is_accepted(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    says = "It is lent.\n\n    Raises:\n        ValueError: never."
    code = f'def f(d: Descriptor):\n    """{says}"""\n    raise ValueError("x")\n'
    module.write_text(code, encoding="utf-8")

    assert [api.lacks(name) for name in api.names(module)] == [[]]


# --- The seed's contract -----------------------------------------------------------------------


def test_the_contract_lists_the_names_that_the_code_has() -> None:
    text = (ROOT / "specs" / "00-contract.md").read_text(encoding="utf-8")
    structs = (messages.NamespaceRequest, messages.NamespaceResponse, messages.AllocationEnded)
    parts = {
        "NamespaceType": [kind.value for kind in messages.NamespaceType],
        **{struct.__name__: list(inspect.signature(struct).parameters) for struct in structs},
        **{x.__name__: methods_of(x) for x in (roles.NamespaceProvider, roles.NamespaceConsumer)},
        "NamespaceError": [error.kind for error in errors.NAMESPACE_ERRORS],
    }

    names = [name for whole in parts for name in (whole, *(f"{whole}.{x}" for x in parts[whole]))]
    assert re.findall(r"^\| \S+ \| `([\w.]+)`", text, re.MULTILINE) == [
        "HANDOFF_SOCKET_PATH",
        *names,
    ]
    assert messages.HANDOFF_SOCKET_PATH in text


def methods_of(trait: type) -> list[str]:
    return [name for name in vars(trait) if name.endswith("_namespaces")]
