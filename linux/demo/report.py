"""The output of the demonstration: checks as lines of text while it runs, or as JSON at the end.

A check is one claim, the value that it takes for the claim to hold, and the value that was found.
The exit code of the demonstration depends on the checks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, TextIO

COLUMNS_MAX: Final = 88
"""Longest line that is written."""

CLAIM_COLUMNS: Final = 46
"""Width of the claims' column; the evidence comes after it."""

_BOLD: Final = "1"
_GREEN: Final = "32"
_RED: Final = "1;31"
_FAINT: Final = "2"


class DemoStopped(Exception):
    """The demonstration is to stop; raised when something is written, never in between."""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, and whether it holds."""

    name: str
    """Stable, for programs."""
    claim: str
    """As text."""
    expected: object
    found: object
    """What was found, in the same form: the claim holds if the two are equal."""
    evidence: str
    """What was found, as text."""

    @property
    def holds(self) -> bool:
        """Whether what was found is what was expected."""
        return self.expected == self.found


class Report:
    """
    What the demonstration has reported so far.

    Args:
        out: Where lines are written; None for none, for `--json`.
        is_coloured: Whether `out` is a terminal that understands colours.
        is_stopped: Called before anything is written; True raises `DemoStopped`.
        overrule: Expected values that replace the real ones, by the name of their check.
    """

    def __init__(
        self,
        out: TextIO | None,
        *,
        is_coloured: bool = False,
        is_stopped: Callable[[], bool] = lambda: False,
        overrule: Mapping[str, object] | None = None,
    ) -> None:
        self._out: Final = out
        self._is_coloured: Final = is_coloured
        self._is_stopped: Final = is_stopped
        self._overrule: Final = overrule or {}
        self._open_line = ""
        """Which allocation the unfinished line is about."""
        self.checks: Final[list[Check]] = []
        self.lifecycles: Final[dict[str, list[str]]] = {}
        self.missing: Final[dict[str, str]] = {}
        self.facts: Final[dict[str, str]] = {}

    @property
    def failures(self) -> list[Check]:
        """The checks that did not hold, in order."""
        return [check for check in self.checks if not check.holds]

    def title(self, text: str) -> None:
        """Write the title."""
        self._line(self._paint(text, _BOLD))

    def section(self, name: str, text: str) -> None:
        """Begin a section."""
        self._line("")
        self._line(f"{self._paint(name, _BOLD)}  {text}")

    def fact(self, name: str, text: str) -> None:
        """Write something that is not checked."""
        self.facts[name] = text
        self._line(f"  {name:<10}{text}"[:COLUMNS_MAX])

    def absent(self, what: str, why: str) -> None:
        """Write what cannot be shown on this machine, and why."""
        self.missing[what] = why
        first, *others = _wrapped(f"{what}: {why}", COLUMNS_MAX - 6)
        self._line(self._paint(f"  --  {first}", _FAINT))
        for line in others:
            self._line(self._paint(f"      {line}", _FAINT))

    def check(
        self, name: str, claim: str, expected: object, found: object, evidence: str | None = None
    ) -> None:
        """
        Check a claim, and write the result.

        Args:
            name: Of the check; used once per run.
            claim: What is true if `found` equals `expected`.
            expected: The value for that.
            found: What the Linux kernel, or the provider, answered.
            evidence: The same as text; None for `found` itself.
        """
        shown = _plain(found) if evidence is None else evidence
        check = Check(name, claim, self._overrule.get(name, expected), found, shown)
        self.checks.append(check)
        self._write_check(check)

    def state(self, subject: str, state: str) -> None:
        """Write that an allocation has reached a state."""
        states = self.lifecycles.setdefault(subject, [])
        text = f"-> {state}" if states else state
        states.append(state)
        if self._open_line == subject:
            self._write(f" {text}")
            return
        self._line(f"  {self._paint('..', _FAINT)}  {subject:<8}{text}", end="")
        self._open_line = subject

    def verdict(self, seconds: float) -> None:
        """Write the overall result, with the time it took."""
        self._line("")
        failures = self.failures
        if not failures:
            text = f"{len(self.checks)} checks, every one held. {seconds:.1f} s."
            self._line(self._paint(text, _GREEN))
            return
        text = f"{len(failures)} of {len(self.checks)} checks did not hold. {seconds:.1f} s."
        self._line(self._paint(text, _RED))
        for check in failures:
            self._line(f"  {check.name}: {check.claim}")

    def as_json(self, seconds: float) -> dict[str, object]:
        """Return everything as plain values."""
        return {
            "holds": bool(self.checks) and not self.failures,
            "seconds": round(seconds, 3),
            "facts": self.facts,
            "missing": self.missing,
            "lifecycles": self.lifecycles,
            "checks": [
                {**asdict(check), "expected": _plain(check.expected), "found": _plain(check.found)}
                | {"holds": check.holds}
                for check in self.checks
            ],
        }

    def _write_check(self, check: Check) -> None:
        if check.holds:
            room = COLUMNS_MAX - CLAIM_COLUMNS - len("  ok    ")
            evidence = check.evidence
            if len(evidence) > room:
                evidence = f"{evidence[: room - 2]}.."
            mark, shown = self._paint("ok", _GREEN), self._paint(evidence, _FAINT)
            self._line(f"  {mark}  {check.claim:<{CLAIM_COLUMNS}}  {shown}")
            return
        self._line(f"  {self._paint('NO', _RED)}  {check.claim}")
        self._line(f"      expected: {_plain(check.expected)}")
        self._line(f"      found:    {_plain(check.found)}")

    def _line(self, text: str, end: str = "\n") -> None:
        if self._open_line:
            self._open_line = ""
            self._write("\n")
        self._write(f"{text}{end}")

    def _write(self, text: str) -> None:
        if self._is_stopped():
            raise DemoStopped
        if self._out is None:
            return
        try:
            print(text, end="", file=self._out, flush=True)
        except BrokenPipeError:
            raise DemoStopped from None

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._is_coloured else text


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return " ".join(map(str, items)) or "none"
    return str(value)


def _wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines
