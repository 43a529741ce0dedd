"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

import pytest

import statemachine
from statemachine.exports import on_demand
from statemachine.lifecycle import TABLES
from statemachine.states import AllocationState
from statemachine.table import Row

asked = on_demand("statemachine", {".lifecycle": "TABLES AllocationState", ".table": "Row"})


def test_basic() -> None:
    assert (asked("TABLES"), asked("AllocationState"), asked("Row")) == (
        TABLES,
        AllocationState,
        Row,
    )


def test_a_name_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match=r"^module 'statemachine' has no attribute 'Table'$"):
        asked("Table")


def test_every_exported_name_is_there() -> None:
    assert all(hasattr(statemachine, name) for name in statemachine.__all__)
