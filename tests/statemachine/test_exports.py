"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import statemachine
from statemachine.exports import on_demand
from statemachine.lifecycle import ALLOCATION, TABLES
from statemachine.table import Row


@pytest.fixture
def asked() -> Callable[[str], Any]:
    homes = {".lifecycle": "TABLES ALLOCATION", ".table": "Row"}
    return on_demand("statemachine", homes)[0]


def test_basic(asked: Callable[[str], Any]) -> None:
    assert (asked("TABLES"), asked("ALLOCATION"), asked("Row")) == (TABLES, ALLOCATION, Row)


def test_a_name_it_does_not_have(asked: Callable[[str], Any]) -> None:
    with pytest.raises(AttributeError, match=r"^module 'statemachine' has no attribute 'Table'$"):
        asked("Table")


def test_a_module_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lazy"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "broken.py").write_text("import not_installed_here")
    (package / "__main__.py").write_text("raise AssertionError('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    asked, _ = on_demand("lazy", {})
    with pytest.raises(ModuleNotFoundError, match="'not_installed_here'"):
        asked("broken")
    with pytest.raises(AttributeError, match="has no attribute '__main__'"):
        asked("__main__")


PACKAGES: Final = (
    "statemachine",
    "statemachine.provider",
    "transport",
    "transport.request",
    "linux",
)
"""Whose names are imported when they are asked for."""


@pytest.mark.parametrize("name", PACKAGES)
def test_a_fresh_program_sees_names_and_modules(name: str) -> None:
    """None of them has been imported there by something else."""
    program = f"""
import {name} as package, inspect, pkgutil, pydoc
missing = {{*package.__all__}} - {{*dir(package)}}
assert not missing, missing
assert pydoc.plain(pydoc.render_doc(package)).count("class ") >= 3
for module in pkgutil.iter_modules(package.__path__):
    if not module.name.startswith("_"):
        assert inspect.ismodule(getattr(package, module.name)), module.name
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_exported_name_is_there() -> None:
    assert all(hasattr(statemachine, name) for name in statemachine.__all__)
