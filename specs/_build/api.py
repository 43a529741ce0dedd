"""Python reference of a package, made from its docstrings; and what a docstring lacks.

Public is what has no underscore, in a module that is no program. The docstring of every such name
says what it means. A function that raises says what, and the state afterwards; one that takes or
returns descriptors says who closes them.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("statemachine", "transport", "linux")
PROGRAMS: Final = (
    "linux.__main__",
    "linux.cli",
    "linux.demo",
    "linux.forge.child",
    "linux.forge.exec",
    "linux.launch",
    *(f"{package}.testing" for package in PACKAGES),
)
"""Modules and folders of modules that are run, not imported by users; and tools for tests."""

_PROGRAMS: Final = tuple(f"{name}." for name in PROGRAMS)

OWNERSHIP: Final = re.compile(r"\b(own(s|ed|er|ership)?|lent|closes?d?|adopts?)\b", re.IGNORECASE)
_OWNED: Final = re.compile(r"\b(Descriptor|DescriptorBundle|Channel|socket)\b")


SHARED: Final = {
    "allocation_id": "Which allocation.",
    "request": "What was asked for.",
    "response": "What was made for it.",
    "connection": "Which connection, in the provider's own numbers.",
    "error": "What went wrong, as it is told to others.",
    "reason": "What went wrong, for a person to read.",
    "kind": "Its name on the wire.",
    "timer": "Which span.",
    "event": "What happened.",
    "effects": "What shall be done, in this order.",
    "state": "Where it stands.",
    "limits": "Who may use it, and how much.",
    "message": "What was said.",
    "pid": "The process' number, good for as long as it is not reaped.",
    "uid": "The user.",
    "gid": "The group.",
}
"""What a field of this name means wherever it has no words of its own."""

MAN_PAGES: Final = {
    "CLONE_": "unshare(2)",
    "MS_": "mount(2)",
    "MNT_": "umount2(2)",
    "UMOUNT_": "umount2(2)",
    "OPEN_TREE_": "open_tree(2)",
    "MOVE_MOUNT_": "move_mount(2)",
    "FSOPEN_": "fsopen(2)",
    "FSMOUNT_": "fsmount(2)",
    "FSCONFIG_": "fsconfig(2)",
    "MOUNT_ATTR_": "mount_setattr(2)",
    "AT_": "openat(2)",
    "RESOLVE_": "openat2(2)",
    "LO_FLAGS_": "loop(4)",
}
"""Where the constants are explained that are the Linux kernel's own."""

_ENUM: Final = re.compile(r"\b(Enum|IntEnum|Flag)\b")


class Name(NamedTuple):
    """A public name."""

    module: str
    name: str
    node: ast.stmt
    doc: str
    """What it says of itself; empty if it says nothing."""

    @property
    def signature(self) -> str:
        """How it is written down."""
        node = self.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            word = "async def " if isinstance(node, ast.AsyncFunctionDef) else ""
            return f"{word}{self.name}({ast.unparse(node.args)}){returns}"
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            return f"class {self.name}({bases})" if bases else f"class {self.name}"
        return ast.unparse(node)


def modules(package: str) -> list[Path]:
    """List the modules of a package that users import, in the order of their names."""
    found = sorted((ROOT / package).rglob("*.py"))
    return [
        path
        for path in found
        if path.stem != "__init__" and not f"{module_of(path)}.".startswith(_PROGRAMS)
    ]


def module_of(path: Path) -> str:
    """Return the dotted name of a module; of one outside the project, its last two parts."""
    parts = path.with_suffix("").parts
    return ".".join(parts[len(ROOT.parts) :] if path.is_relative_to(ROOT) else parts[-2:])


def module_of(path: Path) -> str:
    """Return the dotted name of a module; of one outside the project, its last two parts."""
    parts = path.with_suffix("").parts
    return ".".join(parts[len(ROOT.parts) :] if path.is_relative_to(ROOT) else parts[-2:])


def names(path: Path) -> Iterator[Name]:
    """Find the public names of a module, in their order: its own, and those of its classes."""
    yield from _names(module_of(path), "", ast.parse(path.read_text(encoding="utf-8")).body)


def _names(module: str, prefix: str, body: list[ast.stmt]) -> Iterator[Name]:
    for node, following in zip(body, [*body[1:], None], strict=True):
        name = _name_of(node)
        if name is None or name.startswith("_") or _is_overload(node):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield Name(module, prefix + name, node, ast.get_docstring(node) or "")
        elif not _is_type_variable(node):
            yield Name(module, prefix + name, node, _text_below(following) or _known(prefix, name))
        if isinstance(node, ast.ClassDef) and not _is_enum(node):
            yield from _names(module, f"{prefix}{name}.", node.body)


def _name_of(node: ast.stmt) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _is_overload(node: ast.stmt) -> bool:
    return any(ast.unparse(d) == "overload" for d in getattr(node, "decorator_list", []))


def _is_enum(node: ast.ClassDef) -> bool:
    """Say whether a class lists its members: those that say more than their value do so in it."""
    return any(_ENUM.search(ast.unparse(base)) for base in node.bases)


def _is_type_variable(node: ast.stmt) -> bool:
    return re.search(r"= (TypeVar|ParamSpec)\(", ast.unparse(node)) is not None


def _known(prefix: str, name: str) -> str:
    """Say what a name means that means the same everywhere."""
    if prefix:
        return SHARED.get(name, "")
    pages = [page for start, page in MAN_PAGES.items() if name.startswith(start)]
    return f"As in {pages[-1]}." if pages else ""


def _text_below(node: ast.stmt | None) -> str:
    """Take the text that stands below an assignment, which is how it is documented."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return textwrap.dedent(str(node.value.value)).strip()
    return ""


def lacks(name: Name) -> list[str]:
    """List what a name's docstring does not say."""
    if not name.doc:
        return ["what it means"]
    node, found = name.node, []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        raises = [x for x in ast.walk(node) if isinstance(x, ast.Raise) and x.exc is not None]
        if raises and not re.search(r"Raises:|[Rr]aise", name.doc):
            found.append("what it raises, and the state afterwards")
        if _OWNED.search(ast.unparse(node.args)) and not OWNERSHIP.search(name.doc):
            found.append("who owns what it takes")
        gives = node.returns is not None and _OWNED.search(ast.unparse(node.returns))
        if gives and not OWNERSHIP.search(name.doc):
            found.append("who owns what it returns")
    return found


def reference(package: str) -> str:
    """Write the reference of a package as Markdown."""
    lines: list[str] = []
    for path in modules(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        opening = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
        lines += ["", f"### {module_of(path)}", "", opening, ""]
        lines += [line for name in names(path) for line in _entry(name)]
    return "\n".join(lines)


def _entry(name: Name) -> list[str]:
    signature = re.sub(r"\s+", " ", name.signature)
    if len(signature) > 160:
        signature = f"{signature[:157]}..."
    words = name.doc.split("\n\n")
    rest = [_section(part) for part in words[1:]]
    text = " ".join([" ".join(words[0].split()), *rest]).strip()
    if isinstance(name.node, ast.ClassDef) and _is_enum(name.node):
        text += "".join(f" {_member(one)}" for one in _members(name.node.body))
    depth = "  " * name.name.count(".")
    return [f"{depth}- `{signature}` — {text}" if text else f"{depth}- `{signature}`"]


def _members(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node, following in zip(body, [*body[1:], None], strict=True):
        name = _name_of(node)
        if name and name.isupper():
            yield name, _text_below(following)


def _member(member: tuple[str, str]) -> str:
    name, text = member
    return f"`{name}`: {' '.join(text.split())}" if text else f"`{name}`."


def _section(part: str) -> str:
    """Write a section such as `Raises:` in one line, with the seed's lines linked to chapter 0."""
    line = re.sub(r"^(Args|Returns|Raises|Source|Yields):", r"**\1:**", " ".join(part.split()))
    return re.sub(r"\b[Ss]eed \d+-\d+", r"[\g<0>](00-contract.md)", line)
