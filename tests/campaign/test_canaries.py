"""A bug that is seeded here is found, by the layer that is there for it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest

from specs import model
from tests.campaign.canaries import CANARIES, UPSTREAM, Canary, Layer
from tests.campaign.canaries_campaign import again, name_of
from tests.campaign.canaries_tree import ROOT, Change, Misfit, run_changed
from tests.campaign.guards import GUARD, LINES_MAX, MARK

LAYERS = tuple(dict.fromkeys(canary.layer for canary in CANARIES))


def expect_able(layer: Layer) -> None:
    if layer.is_linux and os.geteuid() != 0:
        pytest.skip("needs root")


# A run of the tests has one canary for each way in which layers work; a campaign has all of them,
# and every layer where nothing is wrong: what a layer runs is in these tests anyway.
QUICK = {canary.layer.function: canary for canary in reversed(CANARIES)}.values()
ALL = [
    pytest.param(c, id=c.name, marks=() if c in QUICK else pytest.mark.deep("canaries"))
    for c in CANARIES
]


@pytest.mark.deep("canaries")
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_a_layer_finds_nothing_where_nothing_is_wrong(layer: Layer) -> None:
    expect_able(layer)
    verdict = layer.run()
    assert verdict.finding is None, verdict.account


@pytest.mark.parametrize("canary", ALL)
def test_a_canary_is_caught(canary: Canary) -> None:
    expect_able(canary.layer)
    verdict = canary.layer.run(canary.changes)
    assert verdict.finding is not None, f"{canary.layer.name} does not see that {canary.name}"


def test_what_a_layer_names_can_be_run() -> None:
    """A test that is not there ends pytest with an error, which would count as a catch."""
    layers = [layer for c in CANARIES for layer in (c.layer, c.also) if layer is not None]
    named = {f"tests/{name}" for x in layers if x.function == "tests" for name in x.arguments}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *sorted(named)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_finding_says_how_its_canary_is_run_again() -> None:
    for canary in (CANARIES[0], CANARIES[-1]):
        _, *arguments = shlex.split(again(canary))
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        run = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert f"[{canary.name}]\n\n1 test collected" in run.stdout, run.stdout + run.stderr


def test_there_are_canaries_of_every_kind() -> None:
    assert len(CANARIES) >= 30
    assert len({canary.name for canary in CANARIES}) == len(CANARIES)
    assert sum(canary.origin == UPSTREAM for canary in CANARIES) >= 6
    packages = Counter(change.path.partition("/")[0] for c in CANARIES for change in c.changes)
    assert min(packages[name] for name in ("statemachine", "transport", "linux")) >= 5


def test_every_canary_fits_the_source() -> None:
    for canary in CANARIES:
        changed: dict[str, str] = {}
        for change in canary.changes:
            changed[change.path] = change.applied(changed.get(change.path))


def marked() -> dict[str, tuple[str, str]]:
    """The guards that the source marks: the file of each, and the lines at its mark."""
    found: dict[str, tuple[str, str]] = {}
    for package in ("statemachine", "transport", "linux"):
        for path in sorted((ROOT / package).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines):
                mark = re.search(MARK, line)
                if mark:
                    assert mark["name"] not in found, f"two guards are called {mark['name']!r}"
                    here = "\n".join(lines[number + 1 : number + 1 + LINES_MAX])
                    found[mark["name"]] = (str(path.relative_to(ROOT)), here)
    return found


def test_every_guard_has_a_canary_that_takes_it_away() -> None:
    changes = {c.name: c.changes for c in CANARIES if c.origin == GUARD}
    guards = marked()
    assert guards.keys() == changes.keys()
    for name, (path, lines) in guards.items():
        (change,) = changes[name]
        assert change.path == path, name
        assert change.old.splitlines()[0] in lines, f"the canary of {name!r} changes other lines"


SECOND_LOOKS = re.compile(
    r"\b(os\.XATTR_CREATE|samestat\(|_is_at\(\w+, \w+\):|_inode_of\(\w+\) ==|_path_is_ours\(\)"
    r"|if (not )?is_open_as\(|_fingerprint\(\w+\) ==)"
)
"""How some guards look in the source."""

NO_GUARDS = {"linux/survey.py": "only says what there is"}
"""Where a second look decides nothing, and why."""


def test_what_looks_like_a_guard_is_marked() -> None:
    for package in ("transport", "linux"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if str(path.relative_to(ROOT)) in NO_GUARDS:
                continue
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines):
                if SECOND_LOOKS.search(line) and "def " not in line and "return" not in line[:20]:
                    above = "\n".join(lines[max(0, number - LINES_MAX) : number])
                    assert re.search(MARK, above), f"{path}:{number + 1} is not marked: {line}"


@pytest.mark.parametrize("old", ["these words stand nowhere", "import"])
def test_a_canary_that_does_not_fit_the_source_is_an_error(old: str) -> None:
    with pytest.raises(Misfit, match="times, not once"):
        Change("transport/framing.py", old, "").applied()


def test_what_does_not_come_to_an_end_is_ended_and_has_found_something() -> None:
    endless = {"specs/model.py": "while True:\n    pass\n"}
    verdict = run_changed(endless, "specs.model:nothing", deadline_s=0.5)
    assert verdict.finding == "no end within 0.5 s"


def test_what_dies_has_found_something() -> None:
    verdict = run_changed({"specs/model.py": "import os\nos._exit(3)\n"}, "specs.model:nothing")
    assert verdict.finding == "its process died"


def test_a_change_is_seen_in_its_copy_alone() -> None:
    changed = {"specs/model.py": "def nothing():\n    raise ValueError('here')\n"}
    assert run_changed(changed, "specs.model:nothing").finding == "ValueError: here"
    assert not hasattr(model, "nothing")
