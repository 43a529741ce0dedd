"""Mutants of the code: one change of mutmut's at a time, tried with the tests that run its line.

    python -m tests.campaign.code_mutants [--minutes M] [--share N] [MODULE]...

counts modules and writes each into `mutants_recorded.json` when it is done, with the date and the
commit. What is recorded of the same source is not counted again, so the command goes on where it
was. It needs the extra `mutation`, and root for most of `linux`; campaigns count samples.

mutmut itself runs every mutant from the start, in a process of its own, and leaves out what has a
decorator. Here its operators alone are used; `code_mutants_run` tries what they make.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.campaign.canaries_tree import ROOT, run_changed

RECORD: Final = Path(__file__).with_name("mutants_recorded.json")
"""Module -> how many mutants of its code there were, and how many were killed."""

PACKAGES: Final = ("statemachine", "transport", "linux")
KERNELS: Final = "statemachine"
"""The package of the kernels: of its mutants more are to be killed than of the others'."""
UNDECIDED: Final = re.compile(r".*/(testing|demo)/.*|.*/__(init|main)__\.py|.*/drawing\.py")
"""Modules that decide nothing: tools for tests, the demonstration, drawings."""

BATCH_S: Final = 3600.0
"""How long the mutants of one module may take."""


@dataclass(frozen=True)
class CodeMutant:
    """A change of one place of a module."""

    line: int
    function: str
    before: str
    after: str
    change: Callable[[], str]
    """Returns the whole module as it reads with the change."""

    def __str__(self) -> str:
        return f"line {self.line}, {self.function}: {_short(self.before)} -> {_short(self.after)}"


def _short(text: str) -> str:
    return " ".join(text.split())[:120]


def modules() -> list[str]:
    """Name every module that decides something, from the root of the repository."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    names = [str(path.relative_to(ROOT)) for path in paths]
    return [name for name in names if not UNDECIDED.fullmatch(name)]


def mutants_of(source: str) -> Iterator[CodeMutant]:
    """Name every mutant of a module's functions, properties and methods, in their order."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import get_ignored_lines

    class Visitor(MutationVisitor):
        """Decorated functions as well: no copy of them is made here."""

        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            if isinstance(node, cst.FunctionDef) and node.decorators:
                return False
            return bool(super()._skip_node_and_children(node))

    wrapper = MetadataWrapper(cst.parse_module(source))
    visitor = Visitor(mutation_operators, get_ignored_lines("", source, wrapper, None))
    module = wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]

    def change(old: cst.CSTNode, new: cst.CSTNode, first: int, last: int) -> str:
        changed = source[:first] + module.code_for_node(new).strip() + source[last:]
        return changed if _is_python(changed) else module.deep_replace(old, new).code

    for mutation in visitor.mutations:
        function, old, new = (
            mutation.contained_by_top_level_function,
            mutation.original_node,
            mutation.mutated_node,
        )
        if isinstance(function, cst.FunctionDef):
            at = positions[old]
            first = starts[at.start.line - 1] + at.start.column
            last = starts[at.end.line - 1] + at.end.column
            yield CodeMutant(
                at.start.line,
                function.name.value,
                source[first:last],
                module.code_for_node(new),
                partial(change, old, new, first, last),
            )


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _differs(changed: str, source: str) -> bool:
    return _is_python(changed) and ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


def tests_of(module: str) -> list[str]:
    """Find the files of tests for a module: those named for it, then those that import it."""
    path = Path(module)
    dotted = module.removesuffix(".py").replace("/", ".")
    package, _, stem = dotted.rpartition(".")
    imports = re.compile(rf"^\s*from {package} import .*\b{stem}\b|\b{re.escape(dotted)}\b", re.M)
    words = {path.stem, path.stem.partition("_")[0], *path.parts[1:-1], *_importers_of(path)}
    named, importing = [], []
    for file in sorted((ROOT / "tests").glob("*/**/test_*.py")):
        if file.relative_to(ROOT / "tests").parts[0] in ("campaign", "bench", "explore", "support"):
            continue
        name = str(file.relative_to(ROOT))
        if any(re.fullmatch(rf"test_(.*_)?{word}(_.*)?", file.stem) for word in words):
            named.append(name)
        elif imports.search(file.read_text(encoding="utf-8")):
            importing.append(name)
    # Those whose name says just this, and of the same package, come first.
    named.sort(key=lambda name: (Path(name).stem != f"test_{path.stem}", path.parts[0] not in name))
    return named + importing


def _importers_of(path: Path) -> set[str]:
    """Name the modules beside it that import a module."""
    imports = re.compile(
        rf"^from \.\w*\b{path.stem} import|^from \. import .*\b{path.stem}\b", re.M
    )
    files = (ROOT / path.parent).glob("*.py")
    return {file.stem for file in files if imports.search(file.read_text(encoding="utf-8"))}


def count(module: str, share: int = 1, seed: int = 0, most: int | None = None) -> dict[str, Any]:
    """
    Try the mutants of a module.

    Args:
        module: from the root of the repository.
        share: one in how many is tried.
        seed: which ones.
        most: no more than these.

    Returns:
        How many there are (`mutants`), were `tried`, `killed`, could not be tried (`untried`), by
        which reason, and the `survivors`.
    """
    source = (ROOT / module).read_text(encoding="utf-8")
    every = list(mutants_of(source))
    chosen = list(range(len(every)))
    random.Random(seed).shuffle(chosen)
    chosen = sorted(chosen[: min(-(-len(every) // share), most or len(every))])
    tried = [
        (every[at], changed) for at in chosen if _differs(changed := every[at].change(), source)
    ]
    plan = {
        "module": module,
        "tests": tests_of(module),
        "mutants": [[mutant.line, changed, str(mutant)] for mutant, changed in tried],
    }
    with tempfile.TemporaryDirectory(prefix="nsh-mutants-") as directory:
        results = Path(directory, "results.json")
        results.write_text(json.dumps(plan), encoding="utf-8")
        call = "tests.campaign.code_mutants_run:prepare"
        ran = run_changed({module: source}, call, str(results), deadline_s=BATCH_S)
        said = json.loads(results.read_text(encoding="utf-8"))
    if "mutants" in said:
        raise RuntimeError(
            f"{module}: nothing could be tried: {ran.finding}\n{ran.account[-2000:]}"
        )
    return {"mutants": len(every), "tried": len(tried), **said}


def digest_of(module: str) -> str:
    """Return what tells one text of a module from another."""
    return hashlib.sha256((ROOT / module).read_bytes()).hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module", metavar="MODULE", nargs="*", help="instead of all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none later")
    parser.add_argument(
        "--share", type=int, default=1, metavar="N", help="of each, one mutant in N"
    )
    options = parser.parse_args()
    until = time.monotonic() + options.minutes * 60
    for module in options.module or modules():
        entry = entries().get(module, {})
        is_known = entry.get("source") == digest_of(module) and entry["share"] <= options.share
        if is_known or time.monotonic() > until:
            continue
        try:
            found = {**count(module, options.share), "share": options.share, **_when(module)}
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        # Read again: another process counts other modules.
        record = {**entries(), module: found}
        RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
        said = f"{found['killed']} of {found['tried']} killed, {found['untried']} not tried"
        print(f"{module}: {said}, {found['seconds']:.0f} s", flush=True)
    return 0


def entries() -> dict[str, dict[str, Any]]:
    """Return what is recorded, by module."""
    found: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def _when(module: str) -> dict[str, str]:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "source": digest_of(module),
    }


if __name__ == "__main__":
    sys.exit(main())
