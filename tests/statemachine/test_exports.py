"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import statemachine
from statemachine.exports import on_demand
from statemachine.lifecycle import ALLOCATION, TABLES
from statemachine.table import Row


@pytest.fixture
def asked() -> Callable[[str], Any]:
    homes = {".lifecycle": "TABLES ALLOCATION", ".table": "Row"}
    return on_demand("statemachine", homes)


def test_basic(asked: Callable[[str], Any]) -> None:
    assert (asked("TABLES"), asked("ALLOCATION"), asked("Row")) == (TABLES, ALLOCATION, Row)


def test_a_name_it_does_not_have(asked: Callable[[str], Any]) -> None:
    with pytest.raises(AttributeError, match=r"^module 'statemachine' has no attribute 'Table'$"):
        asked("Table")


def test_every_exported_name_is_there() -> None:
    assert all(hasattr(statemachine, name) for name in statemachine.__all__)
