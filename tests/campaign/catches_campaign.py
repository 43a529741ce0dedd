"""Which layer of the suite catches which planted bug, each as CI runs it.

The part `canaries` asks whether the layer that is there for a bug sees it. Here every layer is
shown every bug, so that it can be said of each what it is there for: how many it catches, and which
of them no other does. A layer that finds something where nothing is wrong is a finding itself.

From scale 20 on the table is whole: hours of computing, which go on where they were interrupted. At
a smaller scale it has fewer bugs, evenly chosen, and the layers only that do not take minutes; that
these find nothing where nothing is wrong, the tests have shown by then. Below scale 1 it is empty.
"""

from __future__ import annotations

from typing import Final

from statemachine.table import UnsoundTable
from tests.campaign.canaries import BY_NAME, CANARIES, Layer
from tests.campaign.outcome import Discovery, Outcome, Task

DEADLINE_S: Final = 600.0
"""When a layer is taken to hang by what was planted; the slowest takes a sixth of that."""

LAYERS: Final = (
    Layer("explorer", "explorers"),
    Layer("reference model", "models"),
    Layer("pair", "tests", ("suites/test_pair.py",)),
    Layer("stateful machine", "machines", ("handoffs",), is_linux=True),
    Layer("adversarial provider", "machines", ("adversary",), is_linux=True),
    Layer("lying provider", "tests", ("suites/test_lying_provider.py",), is_linux=True),
    Layer("conformance", "tests", ("suites/test_conformance.py",)),
    Layer("virtual loop", "tests", ("suites/test_virtual.py",)),
    Layer("faults", "tests", ("suites/faults",), is_linux=True),
    Layer("contract of backends", "tests", ("linux/test_backend_contract.py",), is_linux=True),
    Layer("tests of statemachine", "tests", ("statemachine",)),
    Layer("tests of transport", "tests", ("transport",)),
    Layer("tests of linux", "tests", ("linux",), is_linux=True),
)
"""All that CI runs for a provider, its drivers and its backends."""

SLOW: Final = ("faults", "tests of transport", "tests of linux")
"""Those that take minutes where there is nothing to be found."""

_BY_NAME: Final = {layer.name: layer for layer in LAYERS}

_ELSEWHERE: Final = ("linux/cli/", "linux/sinks.py")
"""The programs around a provider have tests of their own, and nothing else to be seen by."""

BUGS: Final = tuple(
    canary
    for canary in CANARIES
    if not any(change.path.startswith(_ELSEWHERE) for change in canary.changes)
)

WHOLE: Final = 20.0
"""The scale from which on every layer is shown every bug."""

NO_BUG: Final = ""
"""In the place of a bug's name: the source as it is."""


def tasks(scale: float) -> list[Task]:
    """Each layer on the source as it is, and on each of the bugs that there is time for."""
    is_whole = scale >= WHOLE
    bugs = [bug.name for bug in BUGS[:: 1 if is_whole else round(WHOLE / scale)]] * (scale >= 1)
    return [
        Task(f"{layer.name}: {bug or 'no bug'}", {"layer": layer.name, "bug": bug})
        for bug in ([NO_BUG, *bugs] if is_whole else bugs)
        for layer in LAYERS
        if is_whole or layer.name not in SLOW
    ]


def run(seed: int, layer: str, bug: str) -> Outcome:
    """Let a layer loose on a bug, or on the source as it is."""
    this = _BY_NAME[layer]
    result = this.run(BY_NAME[bug].changes if bug else (), seed, DEADLINE_S)
    outcome = Outcome(seconds=result.seconds)
    # What a table says of itself when it is imported is no layer's merit.
    is_sound = not (result.finding or "").startswith(UnsoundTable.__name__)
    is_caught = result.finding is not None and is_sound
    if not bug:
        if is_caught:
            title = f"the layer {layer} finds something: {result.finding}"
            outcome.discoveries.append(Discovery(title, _again(this)))
        return outcome
    if not is_sound:
        return outcome
    outcome.figures = {"bugs shown to a layer": 1.0, "of these, caught": float(is_caught)}
    outcome.rows.append(
        {
            "bug": bug,
            "layer": layer,
            "caught": "yes" if is_caught else "no",
            "seconds": f"{result.seconds:.1f}",
            "finding": result.finding or "",
        }
    )
    return outcome


def _again(layer: Layer) -> str:
    if layer.function == "tests":
        return "pytest " + " ".join(f"tests/{name}" for name in layer.arguments)
    return f"# tests.campaign.canaries_layers:{layer.function}"
