"""A package's names, imported when they are asked for: what is not used costs no time (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from typing import Any


def on_demand(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Make the `__getattr__` and the `__dir__` of a package.

    Its modules are imported by their names as well, unless these begin with an underscore.

    Args:
        package: its `__name__`.
        homes: module, as in an import statement of that package -> its names, separated by blanks.

    Raises:
        AttributeError: when the first of them is asked for another name.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def imported(name: str) -> Any:
        if name in home_of:
            return getattr(import_module(home_of[name], package), name)
        try:
            # Not `__main__`, which would run.
            if not name.startswith("_"):
                return import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return [*home_of, *vars(import_module(package))]

    return imported, listed


def expect_to_be_alone(path: Sequence[str]) -> None:
    """
    Raise an ImportError if the files of python-statemachine lie in the package's folders, too.

    pip does not object to that. Where theirs were installed last, `transport` says so.
    """
    if PathFinder.find_spec("statemachine.statemachine", path):
        raise ImportError(
            "python-statemachine is installed in the same environment as namespace-handoff, and"
            " both have a package `statemachine`: install each anew in an environment of its own"
        )
