"""The book as a site: `make site` builds these chapters into static HTML with Sphinx.

What it makes needs no network, neither to be built nor to be read. A Mermaid diagram is shown as a
picture (of a table: that of `pictures.py`; of a sequence: that of `sequence.py`), a file that a
chapter links to as a page of its own, and a clause's id is a link to itself. The build is always a
whole one (`-E`).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

from docutils import nodes
from docutils.parsers.rst import Directive
from pygments.lexer import RegexLexer, bygroups
from pygments.token import Comment, Generic, Name, Number, Text
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.osutil import relative_uri

HERE: Final = Path(__file__).resolve().parents[1]
ROOT: Final = HERE.parent
sys.path.insert(0, str(ROOT))

from specs._build import pictures, refresh  # noqa: E402
from specs._build.sequence import sequence  # noqa: E402
from specs._build.svg import arrow_heads  # noqa: E402

project = "Namespace handoff"
author = "the namespace-handoff authors"
extensions = ["myst_parser"]
root_doc = "README"
exclude_patterns = ["__pycache__", "_build"]
html_theme = "furo"
html_title = "Namespace handoff"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_use_index = False
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
highlight_language = "none"
pygments_dark_style = "github-dark"
smartquotes = False

LANGUAGES: Final = {".py": "python", ".c": "c", ".h": "c", ".json": "json"}
"""How the pages of files are coloured, by the end of their names; all others are plain."""

_ANCHOR: Final = re.compile(r'<a id="([^"]+)">')
_NAME: Final = re.compile(r"(?:class |async def )?([\w.]+)")

shown: Final[set[Path]] = set()
"""The files that become pages, because a chapter links to them."""


class Mermaid(Directive):
    """Shows a sequence diagram, or the picture of the table that the diagram draws."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Find the picture; a diagram without one stops the build."""
        diagram = "\n".join(self.content) + "\n"
        if diagram.startswith("sequenceDiagram"):
            kind, picture = "picture sequence", arrow_heads() + sequence(diagram)
        else:
            kind, picture = "picture", pictures.of_diagram(diagram)
        return [nodes.raw("", f'<div class="{kind}">{picture}</div>', format="html")]


class Hex(RegexLexer):
    """Bytes with a remark behind each line, and at last what they mean."""

    name = "hex"
    aliases = ["hex"]  # noqa: RUF012
    tokens = {  # noqa: RUF012
        "root": [
            (r"^= .*\n", Generic.Strong),
            (r"^((?:[0-9a-f]{2} )*[0-9a-f]{2})(.*\n)", bygroups(Number.Hex, Comment)),
            (r".*\n", Text),
        ]
    }


class ScenarioLexer(RegexLexer):
    """Commands behind `>`; below each what followed, `who what` or `who → whom what`."""

    name = "scenario"
    aliases = ["scenario"]  # noqa: RUF012
    tokens = {  # noqa: RUF012
        "root": [
            (r"^> .*\n", Generic.Strong),
            (r"^(\S+(?: → \S+)?)( .*\n)", bygroups(Name.Function, Text)),
            (r".*\n", Text),
        ]
    }


class Clauses(SphinxTransform):
    """Makes a clause's anchor a target that Sphinx knows, and its id a link to itself."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Replace the anchors, which are raw HTML so far."""
        for raw in list(self.document.findall(nodes.raw)):
            found = _ANCHOR.fullmatch(raw.astext())
            if found is None:
                continue
            name, siblings = found[1], raw.parent
            begin = siblings.index(raw)
            end = begin + next(i for i, n in enumerate(siblings[begin:]) if n.astext() == name)
            link = nodes.reference("", "", siblings[end], refid=name, classes=["clause"])
            target = nodes.inline("", "", link, ids=[name], names=[name])
            entry = addnodes.index(entries=[("single", name, name, "main", None)])
            siblings[begin : end + 1] = [entry, target]
            self.document.note_explicit_target(target)


class Names(SphinxTransform):
    """Makes each public name of the reference a place that can be linked and searched for."""

    default_priority = 405

    def apply(self, **_: Any) -> None:
        """Colour the signatures; what they mean stands below them, with no dash before it."""
        for item in list(self.document.findall(nodes.list_item)):
            paragraph = item[0]
            signature, words = [*paragraph.children, None, None][:2]
            if not isinstance(signature, nodes.literal) or not str(words).startswith(" — "):
                continue
            paragraph[1] = nodes.Text(str(words).removeprefix(" — "))
            signature["language"] = "python"
            signature["classes"] += ["code", "signature"]
            found = _NAME.match(signature.astext())
            if found is not None:
                name = f"{_owner(item)}.{found[1].rpartition('.')[2]}"
                item["ids"].append(name)
                short = name.split(".", 2)[-1]
                entry = addnodes.index(entries=[("single", short, name, "main", None)])
                paragraph.insert(0, entry)


def _owner(item: nodes.Node) -> str:
    """Name the class that a name of the reference belongs to, or else its module."""
    above = item.parent
    while not isinstance(above, nodes.list_item | nodes.section):
        above = above.parent
    return above["ids"][0] if isinstance(above, nodes.list_item) else above[0].astext()


class Files(SphinxTransform):
    """Lets links to files lead to their pages; a folder has none, and becomes plain text."""

    default_priority = 410

    def apply(self, **_: Any) -> None:
        """Replace what would be downloads."""
        docname = self.env.docname
        for link in list(self.document.findall(addnodes.download_reference)):
            path = (HERE / docname).parent.joinpath(link["reftarget"]).resolve()
            shown.add(path)
            page = relative_uri(f"{docname}.html", f"{page_of(path)}.html")
            uri = page + fragment_of(path, link.astext())
            link.replace_self(nodes.reference("", "", *link[0].children, refuri=uri, internal=True))
        for link in list(self.document.findall(addnodes.pending_xref)):
            if (HERE / docname).parent.joinpath(link["reftarget"]).is_dir():
                link.replace_self(link[0].children)


def page_of(path: Path) -> str:
    """Name the page of a file."""
    return f"files/{path.relative_to(ROOT)}"


def fragment_of(path: Path, said: str) -> str:
    """Find the line of `module.Name`, if a link to a module says that."""
    module, _, name = said.partition(".")
    if path.suffix != ".py" or module != path.stem:
        return ""
    line = lines_of(path).get(name)
    return f"#line-{line}" if line else ""


@cache
def lines_of(path: Path) -> dict[str, int]:
    """Find where in a module each class and function begins."""
    return dict(_definitions(ast.parse(path.read_text(encoding="utf-8")), ""))


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}", node.lineno
            yield from _definitions(node, f"{prefix}{node.name}.")


def files(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Make a page of each file that is linked to, and the one that a browser opens first."""
    for path in sorted(shown):
        name = str(path.relative_to(ROOT))
        code = app.builder.highlighter.highlight_block(
            path.read_text(encoding="utf-8"),
            LANGUAGES.get(path.suffix, "none"),
            linespans="line",
        )
        yield page_of(path), {"title": name, "body": f"<h1>{name}</h1>\n{code}"}, "page.html"
    yield "index", {}, "first.html"


def complete(_: Any, docname: str, source: list[str]) -> None:
    """Make the parts that only the site has; list the chapters and folders on a first page."""
    page = HERE / docname
    source[0] = refresh.for_site(source[0])
    if page.name == "README":
        numbered = sorted(path.stem for path in page.parent.glob("[0-9]*.md"))
        folders = sorted(f"{path.parent.name}/README" for path in page.parent.glob("*/README.md"))
        chapters = "\n".join([*numbered, *folders])
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{chapters}\n```\n" if chapters else ""


def setup(app: Any) -> None:
    """Register all of that."""
    app.add_directive("mermaid", Mermaid)
    app.add_lexer("hex", Hex)
    app.add_lexer("scenario", ScenarioLexer)
    app.add_transform(Clauses)
    app.add_transform(Names)
    app.add_transform(Files)
    app.connect("source-read", complete)
    app.connect("html-collect-pages", files)
