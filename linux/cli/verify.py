"""`nshandoff verify`: run the verification campaign of a source tree.

The suites are not part of the package, and nothing here imports them. They are a program in the
source tree, which this process executes (execv(2)); so its signals, its terminal and its exit code
are those of that program.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NoReturn

from .exits import ExitCode, Failure

CAMPAIGN: Final = Path("tests/campaign/verify.py")
"""The program, in a source tree."""

EXTRA: Final = ("hypothesis", "pytest")
"""What it imports besides the package: the extra `test`."""

HANDED_ON: Final = ("hours", "scale", "jobs", "seed", "output")
"""Options with a value that are passed on."""


def verify(options: argparse.Namespace) -> NoReturn:
    """
    Execute the campaign of a source tree.

    Raises:
        Failure: ENVIRONMENT, there is no such tree, or what the suites need is not installed.
    """
    tree = _tree_of(options)
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        needs = f"{' and '.join(missing)} cannot be imported"
        raise Failure(ExitCode.ENVIRONMENT, f"{needs}: pip install -e '{tree}[test]'")
    words = [sys.executable, str(tree / CAMPAIGN), *_words_of(options)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, words)


def _tree_of(options: argparse.Namespace) -> Path:
    """Find the source tree: by --tree, here, or where an editable install points to."""
    installed_from = Path(__file__).parents[2]
    candidates = [Path(options.tree)] if options.tree else [Path.cwd(), installed_from]
    for tree in candidates:
        if (tree / CAMPAIGN).is_file():
            return tree.resolve()
    where = " or ".join(map(str, candidates))
    needs = "the suites are not installed with the package; name a source tree with --tree"
    raise Failure(ExitCode.ENVIRONMENT, f"no {CAMPAIGN} in {where}: {needs}")


def _words_of(options: argparse.Namespace) -> list[str]:
    words = [f"--part={part}" for part in options.part]
    for name in HANDED_ON:
        value = getattr(options, name)
        if value is not None:
            words.append(f"--{name}={value}")
    return [*words, "--fresh"] if options.fresh else words
