"""`Parser`: an argument parser that says what is wrong with a command line, and what was meant.

Wrong usage is told in one form, whatever it is: the usage of the verb, one line, the verb's exit
code for it. Imports nothing but argparse, so that `--help` stays quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NoReturn

from .exits import ExitCode

COLUMNS: Final = 80
"""How wide a terminal is taken to be that does not tell."""


class Parser(argparse.ArgumentParser):
    """Accepts no abbreviated options, and has the exit code for wrong usage of its verb."""

    def __init__(self, *, formatter_class: type = argparse.HelpFormatter, **settings: Any) -> None:
        # argparse makes a formatter for each option, and one that is not told its width imports
        # `shutil` to find out, and with it three libraries for compression.
        formatter = partial(formatter_class, width=columns() - 2)
        super().__init__(**settings, formatter_class=formatter, allow_abbrev=False)
        self.failure_code = ExitCode.USAGE
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """
        Print the usage and what is wrong.

        Raises:
            SystemExit: always, with the exit code.
        """
        self.print_usage(sys.stderr)
        self.exit(self.failure_code, f"{self.prog}: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and take what is not known for an error of this parser."""
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(words)
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"too many words: {' '.join(rest)}")
        return namespace, rest

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Exit if an option or a verb is not known; argparse would suggest nothing."""
        remaining = iter(words)
        for word in remaining:
            name, has_value, _ = word.partition("=")
            if word == "--":
                return
            if not word.startswith("-") or word == "-":
                if self._takes_over(word):
                    return
                continue
            action = self._option_string_actions.get(name)
            if action is None:
                known = self._option_string_actions
                self.error(f"there is no option {name}{_suggestion(name, known)}")
            if action.nargs != 0 and not has_value:
                next(remaining, None)

    def _takes_over(self, word: str) -> bool:
        """Say whether what follows this word is not for this parser; exit if it is no verb."""
        for action in self._actions:
            if action.nargs == argparse.REMAINDER:
                return True
            if action.nargs == argparse.PARSER:
                verbs = list(action.choices or ())
                if word not in verbs:
                    kind = str(action.metavar)
                    self.error(f"there is no {kind} {word!r}{_suggestion(word, verbs)}")
                return True
        return False


def columns() -> int:
    """Return the terminal's width, as `shutil.get_terminal_size` does: $COLUMNS counts first."""
    with suppress(KeyError, ValueError):
        if (wanted := int(os.environ["COLUMNS"])) > 0:
            return wanted
    with suppress(OSError):  # standard output is no terminal
        return os.get_terminal_size().columns or COLUMNS
    return COLUMNS


def _suggestion(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
