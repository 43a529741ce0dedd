"""What does the demonstration say, and what did it find out?

A check is one claim, what it takes for the claim to hold, and what was really found. It is a line
of text as soon as it is made, and an object in `--json` at the end. Nothing else decides how the
demonstration exits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, TextIO

COLUMNS_MAX: Final = 88
"""Widest line that is written: fits a terminal, a log and a page."""

CLAIM_COLUMNS: Final = 46
"""Widest claim; the evidence stands behind it."""

_BOLD: Final = "1"
_GREEN: Final = "32"
_RED: Final = "1;31"
_FAINT: Final = "2"


class Interrupted(Exception):
    """Somebody wants the demonstration to stop; raised between two steps, never within one."""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim and its proof."""

    name: str
    """Stable, for programs."""
    claim: str
    """For people."""
    expected: object
    found: object
    """What was found, in the same form: the claim holds if the two are equal."""
    evidence: str
    """What was found, for people."""

    @property
    def holds(self) -> bool:
        """Whether what was found is what was expected."""
        return self.expected == self.found


class Report:
    """
    What the demonstration has said so far.

    Args:
        out: Where lines go as they are said; None says nothing, for `--json`.
        is_coloured: Whether `out` understands colours.
        is_stopped: Asked before everything that is said; True raises `Interrupted`.
        overrule: Expectations in the place of the real ones, by the name of their check.
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
        self._told = ""
        """Whose life the unfinished line tells."""
        self.checks: Final[list[Check]] = []
        self.lifecycles: Final[dict[str, list[str]]] = {}
        self.missing: Final[dict[str, str]] = {}
        self.facts: Final[dict[str, str]] = {}

    @property
    def failures(self) -> list[Check]:
        """The checks that did not hold, in order."""
        return [check for check in self.checks if not check.holds]

    def title(self, text: str) -> None:
        """Say what this is."""
        self._line(self._paint(text, _BOLD))

    def section(self, name: str, text: str) -> None:
        """Begin something new."""
        self._line("")
        self._line(f"{self._paint(name, _BOLD)}  {text}")

    def fact(self, name: str, text: str) -> None:
        """Say something that is neither right nor wrong."""
        self.facts[name] = text
        self._line(f"  {name:<10}{text}"[:COLUMNS_MAX])

    def remark(self, text: str) -> None:
        """Say a sentence."""
        for line in _wrapped(text, COLUMNS_MAX - 2):
            self._line(f"  {line}")

    def absent(self, what: str, why: str) -> None:
        """Say what cannot be shown on this machine, and why."""
        self.missing[what] = why
        first, *others = _wrapped(f"{what}: {why}", COLUMNS_MAX - 6)
        self._line(self._paint(f"  --  {first}", _FAINT))
        for line in others:
            self._line(self._paint(f"      {line}", _FAINT))

    def check(
        self, name: str, claim: str, expected: object, found: object, evidence: str | None = None
    ) -> None:
        """
        Make a claim, and say whether it holds.

        Args:
            name: Of the check, once per run.
            claim: What is so if `found` equals `expected`.
            expected: What it takes.
            found: What the Linux kernel, or the provider, said when it was asked.
            evidence: The same for people; None for `found` itself.
        """
        shown = _plain(found) if evidence is None else evidence
        check = Check(name, claim, self._overrule.get(name, expected), found, shown)
        self.checks.append(check)
        self._say(check)

    def stage(self, subject: str, state: str) -> None:
        """Say, as it happens, that an allocation has reached a state of its life."""
        states = self.lifecycles.setdefault(subject, [])
        text = f"-> {state}" if states else state
        states.append(state)
        if self._told == subject:
            self._write(f" {text}")
            return
        self._line(f"  {self._paint('..', _FAINT)}  {subject:<8}{text}", end="")
        self._told = subject

    def verdict(self, seconds: float) -> None:
        """Say how it all came out, with the time it took."""
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
        """Give everything as plain values."""
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

    def _say(self, check: Check) -> None:
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
        if self._told:
            self._told = ""
            self._write("\n")
        self._write(f"{text}{end}")

    def _write(self, text: str) -> None:
        if self._is_stopped():
            raise Interrupted
        if self._out is None:
            return
        try:
            print(text, end="", file=self._out, flush=True)
        except BrokenPipeError:
            raise Interrupted from None

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
