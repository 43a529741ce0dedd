"""What can be copied and pickled, in all packages: every exception, and no owner of descriptors."""

from __future__ import annotations

import copy
import errno
import importlib
import inspect
import os
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import linux
from linux.anchor import Anchor
from linux.cli.exits import ExitCode
from linux.syscalls import SyscallError
from statemachine import NamespaceType
from statemachine.testing.explore import Bounds
from statemachine.testing.explore.story import Story
from transport import AsyncHandoff, Descriptor, DescriptorBundle, Handoff, Listener
from transport.descriptors import Owner

PACKAGES: Final = ("statemachine", "transport", "linux", "specs")


def classes() -> Iterator[type]:
    """Every class of the packages, once."""
    for package in map(importlib.import_module, PACKAGES):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # What draws the book is not installed.
            if not found.name.endswith("__main__") and "_build" not in found.name:
                module = importlib.import_module(found.name)
                for value in vars(module).values():
                    if inspect.isclass(value) and value.__module__ == found.name:
                        yield value


COPIES: Final = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


# --- Exceptions --------------------------------------------------------------------------------

EXCEPTIONS: Final = [kind for kind in classes() if issubclass(kind, BaseException)]

ARGUMENTS: Final[dict[str, Any]] = {
    "args": "a text",
    "bounds": Bounds(),
    "call": "mount(2)",
    "cause": SyscallError("open(2)", errno.ENOENT, "/x"),
    "clauses": ("LIFE-1",),
    "code": ExitCode.UNAVAILABLE,
    "error": AssertionError("x"),
    "event": "ScopeEmptied",
    "finding": "two live sets",
    "has_hung": True,
    "holder": None,
    "holder_pid": 5,
    "instead": "another line",
    "kind": "FdPassing",
    "line": 3,
    "move": ("connect", 1),
    "nodes": [1],
    "number": errno.EPERM,
    "path": Path("/run/x"),
    "reason": "why",
    "replay": "again",
    "script": (),
    "state": "unknown",
    "step": "mounting",
    "story": Story(Bounds()),
    "subject": "allocation a",
    "text": "what",
    "whose": "ours",
    "advice": "what may help",
}
"""What the constructors take."""


def example(kind: type) -> Any:
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]  # type: ignore[misc]
    named = {p.name: ARGUMENTS[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    others = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return kind(*[ARGUMENTS[p.name] for p in parameters if p.kind not in others], **named)


def shown(error: Any) -> object:
    fields = {name: repr(value) for name, value in vars(error).items()}
    return type(error), str(error), repr(error), fields, getattr(error, "errno", None)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_every_exception_can_be_copied_and_pickled(again: Callable[[Any], Any]) -> None:
    assert len(EXCEPTIONS) > 40
    for kind in EXCEPTIONS:
        error = example(kind)
        error.add_note("seen here")
        assert shown(again(error)) == shown(error)


# --- Owners of descriptors ---------------------------------------------------------------------


@pytest.mark.parametrize("again", COPIES)
def test_a_descriptor_has_one_owner(again: Callable[[Any], Any]) -> None:
    with Descriptor(os.memfd_create("nshandoff-test")) as owner:
        for it in (owner, DescriptorBundle([NamespaceType.PID], [owner])):
            with pytest.raises(TypeError, match=f"cannot copy or pickle '{type(it).__name__}'"):
                again(it)


def test_what_can_be_closed_and_entered_is_an_owner() -> None:
    owners = [
        kind
        for kind in classes()
        if hasattr(kind, "close")
        and (hasattr(kind, "__enter__") or hasattr(kind, "__aenter__"))
        and "testing" not in kind.__module__
    ]
    assert {Descriptor, Handoff, AsyncHandoff, linux.Consumer, Anchor, Listener} < {*owners}
    assert [kind for kind in owners if not issubclass(kind, Owner)] == []
