"""The book is a site: every clause has an address, every link leads, nothing is fetched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

from specs._build import clauses, pictures, refresh
from statemachine.drawing import mermaid
from statemachine.lifecycle import TABLES
from statemachine.table import Table

ROOT: Final = Path(__file__).resolve().parents[2]
SPECS: Final = ROOT / "specs"
PAGES: Final = sorted(str(path.relative_to(SPECS)) for path in SPECS.rglob("*.md"))

_LINK: Final = re.compile(r'<(\w+)\b[^>]*?\s(?:href|src)="([^"]*)"')
_LOADED: Final = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]*)""")
_ID: Final = re.compile(r'\bid="([^"]*)"')


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it as `make site` does; as root, where there is no network."""
    folder = tmp_path_factory.mktemp("book")
    (command,) = re.findall(r"-m (sphinx .*) \$\(ARGS\)", (ROOT / "Makefile").read_text("utf-8"))
    words = command.replace("build/", f"{folder}/").split()
    offline = ["unshare", "--net"] if os.geteuid() == 0 else []
    built = subprocess.run(
        [*offline, sys.executable, "-m", *words, str(SPECS), str(folder / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (built.returncode, built.stderr) == (0, "")
    return folder / "site"


def objections(site: Path) -> Iterator[str]:
    """Find links that lead nowhere, ids that are there twice, and what comes from elsewhere."""
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    ids = {path: _ID.findall(text) for path, text in texts.items()}
    for path, text in texts.items():
        name = path.relative_to(site)
        yield from (f"{name}: {one} twice" for one in set(ids[path]) if ids[path].count(one) > 1)
        for tag, target in set(_LINK.findall(text)):
            parts = urlsplit(target)
            if parts.scheme == "data":
                continue
            if parts.netloc or parts.scheme:
                if tag != "a":
                    yield f"{name}: loads {target}"
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file():
                yield f"{name}: {target} leads nowhere"
            elif parts.fragment and unquote(parts.fragment) not in ids.get(there, []):
                yield f"{name}: {target} is not in that page"
    for path in (*texts, *site.rglob("*.css"), *site.rglob("*.svg")):
        found = _LOADED.findall(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(site)}: loads {one}" for one in found)


# --- The site ----------------------------------------------------------------------------------


@pytest.mark.deep("long")
def test_basic_every_chapter_is_a_page(site: Path) -> None:
    there = [page for page in PAGES if (site / page).with_suffix(".html").is_file()]

    assert there == PAGES
    assert "url=README.html" in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.deep("long")
def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert list(objections(site)) == []


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ('<a href="gone.html">', "gone.html leads nowhere"),
        ('<a href="#gone">', "#gone is not in that page"),
        ('<a id="x"><b id="x">', "x twice"),
        ('<script async src="https://elsewhere/x.js">', "loads https://elsewhere/x.js"),
        ('<link rel="y" href="//elsewhere/x.css">', "loads //elsewhere/x.css"),
        ("<style>p { background: url('http://elsewhere/x') }", "loads http://elsewhere/x"),
    ],
)
def test_what_is_wrong_with_a_page_is_named(tmp_path: Path, page: str, says: str) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")

    assert list(objections(tmp_path)) == [f"page.html: {says}"]


@pytest.mark.deep("long")
def test_every_clause_has_an_address_which_its_id_shows(site: Path) -> None:
    for clause in clauses.clauses().values():
        page = (site / clause.chapter.name).with_suffix(".html").read_text(encoding="utf-8")
        assert page.count(f'id="{clause.id}"') == 1
        assert f'href="#{clause.id}"' in page


@pytest.mark.deep("long")
def test_the_index_leads_to_the_line_where_a_clause_is_kept(site: Path) -> None:
    index = (site / "15-clauses.html").read_text(encoding="utf-8")
    page, line = re.findall(
        r'href="(files/transport/endpoint\.py\.html)#line-(\d+)"[^>]*>(?:<[^>]*>)*endpoint\.listen<',
        index,
    )[0]
    code = (ROOT / "transport" / "endpoint.py").read_text(encoding="utf-8").splitlines()

    assert code[int(line) - 1].startswith("def listen(")
    shown = (site / page).read_text(encoding="utf-8").partition(f'id="line-{line}"')[2]
    assert "listen" in shown.partition('id="line-')[0]


@pytest.mark.deep("long")
def test_what_only_the_site_has_is_on_it(site: Path) -> None:
    texts = {page: (SPECS / page).read_text(encoding="utf-8") for page in PAGES}
    made = {page: refresh.for_site(text) for page, text in texts.items()}
    changed = [page for page in PAGES if made[page] != texts[page]]

    assert [page[:2] for page in changed] == ["12", "13", "14", "15"]
    for page in changed:
        html = (site / page).with_suffix(".html").read_text(encoding="utf-8")
        headings = re.findall(r"^##+ (.*)$", made[page], re.MULTILINE)
        assert len(headings) >= 4
        assert [one for one in headings if f">{escape(one, quote=False)}<" not in html] == []


@pytest.mark.deep("long")
def test_the_chapters_are_listed_in_reading_order(site: Path) -> None:
    page = (site / "README.html").read_text(encoding="utf-8")
    listed = re.findall(r'toctree-l1[^>]*><a[^>]*href="([^"]*)\.html"', page)
    numbered = [chapter.stem for chapter in clauses.CHAPTERS]

    assert listed == [*numbered, "scenarios/README", "vectors/README"]


@pytest.mark.deep("long")
def test_words_and_clauses_can_be_searched_for_without_a_server(site: Path) -> None:
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    pages = [index["docnames"].index(name) for name in ("02-messages", "15-clauses")]

    assert set(pages) <= set(index["terms"]["wire"])
    assert set(clauses.clauses()) <= {name.upper() for name in index["indexentries"]}
    assert index["indexentries"]["wire-1"] == [[pages[0], "WIRE-1", True]]
    assert "ConsumerKernel.receive".lower() in index["indexentries"]


# --- Its pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_picture_is_fresh(table: Table) -> None:
    kept = pictures.path_of(table).read_text(encoding="utf-8")

    assert kept == f"{pictures.draw(table)}\n", "run: python -m specs._build.refresh"


def test_every_kept_picture_is_that_of_a_table() -> None:
    assert set(pictures.FOLDER.iterdir()) == {pictures.path_of(table) for table in TABLES}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_picture_stands_alone_and_says_every_move(table: Table) -> None:
    picture = ElementTree.fromstring(pictures.draw(table))
    svg = "{http://www.w3.org/2000/svg}"
    words = picture.findtext(f"{svg}desc") or ""
    drawn = [element.text for element in picture.iter(f"{svg}text")]
    moves = [row for row in table.rows if row.source is not row.target]

    assert picture.tag == f"{svg}svg"
    assert picture.findtext(f"{svg}title")
    assert {row.event.__name__ for row in moves} <= {*drawn} & {*re.findall(r"\w+", words)}
    assert {state.value for state in table.states} <= {*drawn}
    assert sum(text == "EndReceived" for text in drawn) == len(
        {(row.source, row.target) for row in moves if row.event.__name__ == "EndReceived"}
    )
    ends = {path.get("marker-end") for path in picture.iter(f"{svg}path")} - {None}
    assert ends == {f"url(#{marker.get('id')})" for marker in picture.iter(f"{svg}marker")}


@pytest.mark.deep("long")
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_diagram_is_shown_as_the_picture_of_its_table(site: Path, table: Table) -> None:
    page = (site / "03-lifecycle.html").read_text(encoding="utf-8")

    assert pictures.of_diagram(mermaid(table)) in page
    assert "stateDiagram" not in page


def test_a_diagram_of_no_table_has_no_picture() -> None:
    with pytest.raises(ValueError, match="no table looks like this"):
        pictures.of_diagram("stateDiagram-v2\n")
