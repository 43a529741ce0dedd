"""The book as a site: `make site` builds these chapters into static HTML with Sphinx.

What it makes needs no network, neither to be built nor to be read. A Mermaid diagram is shown as
the picture that `refresh.py` drew of the same table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from specs import pictures  # noqa: E402

project = "Namespace handoff"
author = "the namespace-handoff authors"
extensions = ["myst_parser"]
root_doc = "README"
exclude_patterns = ["**.py", "__pycache__"]
html_theme = "furo"
html_title = "Namespace handoff"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
myst_links_external_new_tab = False
highlight_language = "none"
# Links out of the book lead to the code, which is not part of the site.
suppress_warnings = ["myst.xref_missing"]


class Mermaid(Directive):
    """Shows the picture of the table that the diagram draws."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Find the picture; a diagram without one stops the build."""
        picture = pictures.of_diagram("\n".join(self.content) + "\n")
        return [nodes.raw("", picture, format="html")]


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("mermaid", Mermaid)
    return {"parallel_read_safe": True}
