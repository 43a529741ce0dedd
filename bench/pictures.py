"""Pictures of a run, as SVG: distributions, creation beside many alive, processor time by process.

Raises ImportError where matplotlib is not installed: `.ci/setup bench` installs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.measures import Taken
from bench.ratios import pooled

mpl.rcParams["svg.hashsalt"] = "bench"  # ids in the files are the same every time
FIGURES: Final = ("create", "release", "life", "ask again", "emptied", "spawn")
COLOURS: Final = {"ours": "tab:blue", "floor": "tab:gray", "socket": "tab:gray"}
OTHER_COLOURS: Final = ("orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")


def draw(taken: Taken, report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw all pictures into a folder; name them."""
    pictures = {
        "latency.svg": latencies(taken),
        "alive.svg": alive(report["alive_us"], report["settings"]["many"]),
        "processor.svg": processor(report["processor_us"]),
    }
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / name)
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def latencies(taken: Taken) -> Figure:
    """Draw which part of the values is below a time, ours and every other's."""
    figure = Figure(figsize=(10, 11), layout="constrained")
    for axes, name in zip(figure.subplots(3, 2).flat, FIGURES, strict=True):
        axes.set_prop_cycle(color=[f"tab:{colour}" for colour in OTHER_COLOURS])
        for (measured, whose), rounds in taken.rounds.items():
            values = sorted(pooled(rounds))
            if measured == name and values:
                shares = [(number + 1) / len(values) for number in range(len(values))]
                width = 2.0 if whose == "ours" else 1.0
                axes.step(values, shares, label=whose, lw=width, color=COLOURS.get(whose))
        axes.set(title=name, xscale="log", xlabel="µs", ylabel="share of values", ylim=(0, 1))
        axes.grid(visible=True, which="both", alpha=0.2)
        if axes.lines:
            axes.legend(fontsize="small", loc="lower right")
    return figure


def alive(medians: Mapping[str, list[float]], many: int) -> Figure:
    """Draw the creation time against how many allocations are alive."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for whose, values in medians.items():
        size = many // len(values)
        numbers = [(tenth + 1) * size for tenth in range(len(values))]
        axes.plot(numbers, values, marker="o", label=whose, color=COLOURS.get(whose))
    axes.set(xlabel="allocations alive", ylabel="µs, median of a creation")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.2)
    if axes.lines:
        axes.legend()
    return figure


def processor(used: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the processor time of a life by process, ours beside the floor."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    parts = sorted({part for each in used.values() for part in each})
    below = dict.fromkeys(used, 0.0)
    for part in parts:
        heights = [used[whose].get(part, 0.0) for whose in used]
        axes.bar(list(used), heights, bottom=list(below.values()), label=part, width=0.5)
        below = {whose: below[whose] + used[whose].get(part, 0.0) for whose in used}
    axes.set(ylabel="µs of processor time, a life")
    if parts:
        axes.legend()
    return figure
