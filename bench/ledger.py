"""The account of a soak: what became of every allocation, and which figures changed over time."""

from __future__ import annotations

import math
import os
import random
import re
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

BROKEN_MAX: Final = 50
"""How many broken promises are told."""

BLOCKS: Final = 100
RESAMPLES: Final = 2000
FLAT_MAX: Final = 1.05


# --- What is compared over time ------------------------------------------------------------------


class Series:
    """Means of a figure in blocks of time, of which it keeps two numbers each."""

    def __init__(self) -> None:
        self._sums, self._counts = [0.0] * BLOCKS, [0] * BLOCKS

    def add(self, fraction: float, value: float) -> None:
        """Count a value, that was measured when this fraction of the time had passed."""
        block = min(max(int(fraction * BLOCKS), 0), BLOCKS - 1)
        # Times have a long tail and are compared as ratios: geometric means.
        self._sums[block] += math.log(max(value, 1e-9))
        self._counts[block] += 1

    def tenth(self, number: int) -> list[float]:
        width = BLOCKS // 10
        blocks = range(number * width, (number + 1) * width)
        return [self._sums[b] / self._counts[b] for b in blocks if self._counts[b]]

    def compared(self, rng: random.Random) -> dict[str, Any] | None:
        """Compare the last tenth with the first; None if one of them has too little to say."""
        first, last = self.tenth(0), self.tenth(9)
        if min(len(first), len(last)) < 3:
            return None

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        def resampled() -> float:
            drawn = (mean(rng.choices(each, k=len(each))) for each in (last, first))
            return math.exp(next(drawn) - next(drawn))

        ratios = sorted(resampled() for _ in range(RESAMPLES))
        low, high = ratios[RESAMPLES // 40], ratios[-RESAMPLES // 40]
        verdict = "flat" if high <= FLAT_MAX else "not flat" if low > FLAT_MAX else "not decided"
        return {
            "first": math.exp(mean(first)),
            "last": math.exp(mean(last)),
            "ratio": math.exp(mean(last) - mean(first)),
            "low": low,
            "high": high,
            "verdict": verdict,
        }


def process_figures(pid: int | str) -> dict[str, float]:
    """Memory, descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.partition(":")[::2] for line in status.splitlines())
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    pss = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
    return {
        "memory, PSS KiB": float(pss.split()[1]),
        "memory, RSS KiB": float(fields["VmRSS"].split()[0]),
        "descriptors": float(len(os.listdir(f"/proc/{pid}/fd"))),
        "threads": float(fields["Threads"]),
    }


# --- The account of every allocation -------------------------------------------------------------


@dataclass
class LedgerEntry:
    """What is known of one allocation that is not over."""

    member: int
    request: tuple[str, list[str], str | None]
    state: str = "asked"
    identities: tuple[str, ...] = ()


class Ledger:
    """
    Takes what consumers report, and says what was broken.

    A consumer reports a step before it does what can end an allocation, and after it has what it
    asked for: so it is known at every moment what must be alive. Reports of all consumers come
    through one pipe, which keeps causes before their effects.

    Args:
        is_unique: whether the identity of a namespace is never that of a later one.
    """

    def __init__(self, is_unique: bool = True) -> None:
        self.entries: dict[str, LedgerEntry] = {}
        self.fates: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.hand_overs = 0
        self.broken: list[str] = []
        self.series: dict[str, Series] = {}
        self.fraction: float | None = None
        """Of the time in which figures are taken; None outside of it."""
        self._is_unique = is_unique
        self._owners: dict[str, str] = {}
        self._former: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def take(self, kind: str, name: str, *details: Any) -> None:
        getattr(self, f"on_{kind}")(name, *details)

    def breaks(self, what: str) -> None:
        if len(self.broken) < BROKEN_MAX:
            self.broken.append(what)

    def measure(self, name: str, value: float | None) -> None:
        if self.fraction is not None and value is not None:
            self.series.setdefault(name, Series()).add(self.fraction, value)

    def figures(self, rng: random.Random) -> dict[str, Any]:
        compared = {name: series.compared(rng) for name, series in sorted(self.series.items())}
        return {name: each for name, each in compared.items() if each is not None}

    def has_any(self, member: int) -> bool:
        return any(entry.member == member for entry in self.entries.values())

    def inherit(self, member: int, heir: int) -> list[tuple[str, LedgerEntry]]:
        """Give what a consumer had to another one, and say what that is."""
        orphans = [(name, e) for name, e in self.entries.items() if e.member == member]
        for _, entry in orphans:
            entry.member = heir
        return orphans

    def close(self) -> None:
        """Say what has no fate."""
        for name, entry in self.entries.items():
            self.breaks(f"{name}: {entry.state}, and nothing became of it")

    def on_asked(self, name: str, member: int, request: Any) -> None:
        if name in self.entries:
            self.breaks(f"{name}: asked for, and not over: {self.entries[name]}")
        self.entries[name] = LedgerEntry(member, tuple(request))

    def on_got(self, name: str, identities: list[str], took_ms: float | None) -> None:
        """A new allocation is in hand."""
        self.hand_overs += 1
        entry = self.entries[name]
        entry.state, entry.identities = "held", tuple(identities)
        kinds = [identity.partition(":")[0] for identity in identities]
        if kinds != entry.request[1]:
            self.breaks(f"{name}: asked for {entry.request[1]}, got {kinds}")
        for identity in identities:
            owner = self._owners.setdefault(identity, name)
            if owner != name:
                self.breaks(f"{name}: wrong namespace: {identity} is that of {owner}")
        again = set(identities) & set(self._former.pop(name, ()))
        if again and self._is_unique:
            self.breaks(f"{name}: wrong namespace: {again} had ended")
        self.measure("create, ms", took_ms)

    def on_again(self, name: str, identities: list[str]) -> None:
        """A living allocation is handed over once more."""
        self.hand_overs += 1
        entry = self.entries[name]
        if entry.identities != tuple(identities):
            self.breaks(f"{name}: wrong namespace: it is {entry.identities}, got {identities}")

    def on_entering(self, name: str) -> None:
        self.entries[name].state = "entering"

    def on_entered(self, name: str) -> None:
        self.entries[name].state = "held"

    def on_ending(self, name: str, how: str) -> None:
        entry = self.entries[name]
        entry.state = how
        for identity in entry.identities:
            if self._owners.get(identity) == name:
                del self._owners[identity]

    def on_over(self, name: str, took_ms: float | None) -> None:
        entry = self.entries.pop(name)
        self.fates[entry.state] += 1
        self._former[name] = entry.identities
        if len(self._former) > 1000:
            self._former.popitem(last=False)
        self.measure("end, ms", took_ms)

    def on_refused(self, name: str, reason: str) -> None:
        del self.entries[name]
        self.fates["refused"] += 1
        alike = re.sub(r"\d+", "N", reason.replace(name, "NAME"))  # whatever the numbers in it
        self.refusals[alike[:120]] += 1

    def on_broken(self, name: str, what: str) -> None:
        self.breaks(f"{name}: {what}")

    def outcome(self, seconds: float, rng: random.Random) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "hand_overs": self.hand_overs,
            "fates": dict(self.fates),
            "refusals": dict(self.refusals),
            "figures": self.figures(rng),
            "broken": self.broken,
        }
