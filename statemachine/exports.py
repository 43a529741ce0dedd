"""A package's names, imported when they are asked for: what is not used costs no time (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_demand(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """
    Make the `__getattr__` of a package.

    Args:
        package: its `__name__`.
        homes: module, as in an import statement of that package -> its names, separated by blanks.

    Raises:
        AttributeError: when what was made is asked for another name; nothing was imported.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def imported(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home_of[name], package), name)

    return imported
