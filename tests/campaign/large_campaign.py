"""Tests that take minutes each, marked `deep("large")`: part of a campaign from scale 1 on."""

from __future__ import annotations

from tests.campaign.long_campaign import run, tasks_of
from tests.campaign.outcome import Task

__all__ = ["run", "tasks"]


def tasks(scale: float) -> list[Task]:
    """List the files that have such tests."""
    return tasks_of("large") if scale >= 1 else []
