"""`nshandoff request` and `nshandoff end`: request or end an allocation by hand."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack, closing, suppress
from typing import Any, Final

from statemachine.errors import NamespaceError
from transport.endpoint import begin_connect
from transport.request import Cancelled, Handoff

from ..features import Features
from ..namespaces import KernelInspector
from ..syscalls import signalfd
from .consumer import (
    END_TIMEOUT_S,
    INTERRUPTIONS,
    consumer_of,
    failure_of,
    id_of,
    inspector_of,
    obtain,
    own_namespaces,
    request_of,
    signals_taken,
    stopping,
)
from .exits import ExitCode, print_error

SCHEMA: Final = 1
"""Version of what `--json` prints; keys are added without a new one, never changed."""

WAIT_S: Final = 3600.0
"""How long to wait for the end at a time."""


def request(options: argparse.Namespace) -> ExitCode:
    """
    Obtain namespaces, print them, and keep the descriptors until a signal or the end.

    Raises:
        Failure: the command line makes no sense, or there are no namespaces.
        Interrupted: a signal came before.
    """
    wanted = request_of(options)
    features = Features.probe()
    with signals_taken(INTERRUPTIONS) as taken, ExitStack() as stack:
        own = None
        if options.fallback != "never" and options.backend == "linux":
            own = stack.enter_context(closing(own_namespaces(options, features)))
        consumer = consumer_of(options, inspector_of(options, features), own)
        handoff = stack.enter_context(obtain(consumer, wanted, own, taken))
        show = _show_json if options.json else _show
        try:
            show(describe(handoff))
            with suppress(Cancelled), signalfd(stopping(taken)) as cancel:
                while not handoff.wait_ended(WAIT_S, cancel=cancel.fileno()):
                    pass
        finally:  # also where it cannot be shown
            _let_go(handoff, ends=options.end)
    return ExitCode.OK


def end(options: argparse.Namespace) -> ExitCode:
    """
    End an allocation, and wait for the provider to confirm.

    Raises:
        Failure: NO, the provider does not know it; UNAVAILABLE, it did not confirm.
    """
    name = id_of(options)
    try:
        _expect_provider(options.socket)
        consumer_of(options, KernelInspector(Features())).end(name, END_TIMEOUT_S)
    except NamespaceError as error:
        raise failure_of(error) from error
    print_error(f"{name} has ended")
    return ExitCode.OK


def describe(handoff: Handoff) -> dict[str, Any]:
    """Return what was received, as the Linux kernel identifies it, as plain values."""
    fallback = handoff.fallback
    return {
        "schema": SCHEMA,
        "allocation_id": handoff.response.allocation_id,
        "fd_types": [kind.value for kind in handoff.response.fd_types],
        "uenv_mount_path": handoff.response.uenv_mount_path,
        "descriptors": [
            {
                "type": identity.kind.value,
                # Older Linux kernels have no id; device and inode identify it then.
                "namespace_id": identity.key[0] if len(identity.key) == 1 else None,
                "device": (status := os.fstat(descriptor.fileno())).st_dev,
                "inode": status.st_ino,
                "fd": descriptor.fileno(),
            }
            for identity, (_, descriptor) in zip(handoff.identities, handoff.bundle, strict=True)
        ],
        "is_degraded": handoff.is_degraded,
        "fallback": None if fallback is None else str(fallback),
        "pid": os.getpid(),
    }


def _show_json(received: dict[str, Any]) -> None:
    print(json.dumps(received), flush=True)


def _show(received: dict[str, Any]) -> None:
    print("allocation", received["allocation_id"])
    for one in received["descriptors"]:
        place = f"/proc/{received['pid']}/fd/{one['fd']}"
        print(f"  {one['type']:<6} id {one['namespace_id']}  inode {one['inode']}  {place}")
    if received["uenv_mount_path"] is not None:
        print("  image at", received["uenv_mount_path"])
    if received["is_degraded"]:
        print("  degraded:", received["fallback"])
    print(end="", flush=True)


def _let_go(handoff: Handoff, *, ends: bool) -> None:
    """End the allocation if that was requested, and print what becomes of it."""
    name = handoff.request.allocation_id
    if handoff.is_ended:
        print_error(f"{name} has ended")
    elif ends:
        is_confirmed = handoff.end(END_TIMEOUT_S)
        print_error(f"{name} has ended" if is_confirmed else f"the end of {name} was not confirmed")
    elif handoff.is_own:
        print_error(f"{name} was made by self-service and ends now")
    else:
        print_error(f"{name} stays alive")


def _expect_provider(path: str) -> None:
    """
    Fail at once if nothing listens on the socket.

    `Consumer.end` tries to connect until its timeout, which is too long after a mistyped path.
    """
    with suppress(BlockingIOError):  # it listens, and is busy
        begin_connect(path).close()
