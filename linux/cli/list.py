"""`nshandoff list`: list the allocations, and why one is still alive."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from statemachine.states import AllocationState
from transport.calls import syscall

from ..doctor import examine, expect_directory
from ..features import Features
from ..journal import JOURNAL_NAME, LOCK_NAME, JournalError, JournalUnavailable
from ..survey import AllocationSeen, NodeSeen, survey_node
from ..syscalls import SyscallError
from .exits import ExitCode, Failure, ended_by_sigpipe

SCHEMA: Final = 1
"""Version of what `--json` prints; keys are added without a new one, never changed."""

COLUMN_GAP: Final = "  "


@ended_by_sigpipe()
def list_allocations(options: argparse.Namespace) -> ExitCode:
    """
    Print the allocations of a state directory.

    Raises:
        Failure: ENVIRONMENT, it is no state directory, or journal or Linux kernel cannot be read.
    """
    state_dir = Path(options.state_dir)
    try:
        features = Features.probe()
        _expect_state(state_dir)
        found = examine(state_dir, features, is_whole_node=False)
        attention = [it for it in found if it.needs_attention]
        node = survey_node(state_dir, features)
    except (JournalError, SyscallError) as error:
        raise Failure(ExitCode.ENVIRONMENT, str(error), type(error).__name__) from error
    if options.json:
        print(json.dumps({**as_json(node, state_dir), "attention": [it.what for it in attention]}))
    else:
        print("\n".join(as_text(node, state_dir)))
        if attention:
            print("\nneeds attention, as `nshandoff doctor` explains:")
            print("\n".join(f"{it.verdict.value:8}{it.what}: {it.why}" for it in attention))
    return ExitCode.OK


def _expect_state(state_dir: Path) -> None:
    """Refuse a directory that no provider has ever used: it is mistyped."""
    expect_directory(state_dir)
    if not any(syscall((state_dir / name).exists) for name in (LOCK_NAME, JOURNAL_NAME)):
        raise JournalUnavailable(state_dir, "it is no provider's state directory")


def as_json(node: NodeSeen, state_dir: Path) -> dict[str, Any]:
    """Return what was found as plain values."""
    provider = node.provider
    return {
        "schema": SCHEMA,
        "state_dir": str(state_dir),
        "provider": provider and {"pid": provider.pid, "socket": provider.socket},
        "allocations": [_allocation_as_json(seen) for seen in node.allocations],
        "images": [
            {"image": i.image, "device": i.device, "file": i.file, "users": list(i.users)}
            for i in node.images
        ],
        "remembered": list(node.remembered),
        "ahead": node.ahead,
    }


def _allocation_as_json(seen: AllocationSeen) -> dict[str, Any]:
    entry = seen.entry
    return {
        "allocation_id": entry.allocation_id,
        "state": entry.state.value,
        "requested": [kind.value for kind in entry.request.namespaces],
        "namespaces": [
            {
                "type": namespace.identity.kind.value,
                # Older Linux kernels have no id, only the inode.
                "namespace_id": key[0] if len(key := namespace.identity.key) == 1 else None,
                "inode": namespace.inode,
            }
            for namespace in seen.namespaces
        ],
        "init_pid": seen.init_pid,
        "scope": None if seen.scope is None else str(seen.scope),
        "processes": [
            {"pid": one.pid, "state": one.state, "command": one.command} for one in seen.processes
        ],
        "image": entry.request.uenv_image,
        "mount_path": entry.mount_path,
        "why": seen.why,
    }


def as_text(node: NodeSeen, state_dir: Path) -> list[str]:
    """Return what was found as lines of text."""
    provider = node.provider
    lines = [
        f"provider {provider.pid} serves {provider.socket}"
        if provider
        else f"no provider serves from {state_dir}"
    ]
    if node.ahead:
        lines.append(f"anchors made ahead: {node.ahead}")
    lines += ["", *_allocations_as_text(node)]
    if node.images:
        head = ("IMAGE", "DEVICE", "FILE", "USED BY")
        rows = [(i.image, i.device, i.file, ", ".join(i.users) or "-") for i in node.images]
        lines += ["", *_table(head, rows)]
    return lines


def _allocations_as_text(node: NodeSeen) -> list[str]:
    if not node.allocations:
        return ["no allocations"]
    head = ("ALLOCATION", "STATE", "INIT", "PROCESSES", "NAMESPACES", "IMAGE")
    lines = _table(head, [_allocation_as_row(seen) for seen in node.allocations])
    for seen in node.allocations:
        if seen.why is not None:
            lines.append(f"{seen.entry.allocation_id}: {seen.why}")
    return lines


def _allocation_as_row(seen: AllocationSeen) -> tuple[str, ...]:
    entry = seen.entry
    living = [f"{one.identity.kind.value}:{one.inode}" for one in seen.namespaces]
    asked = [kind.value for kind in entry.request.namespaces]
    init = str(seen.init_pid or ("-" if entry.state is AllocationState.REQUESTED else "dead"))
    image = entry.request.uenv_image or "-"
    processes = str(len(seen.processes)) if seen.scope is not None else "-"
    return entry.allocation_id, entry.state.value, init, processes, " ".join(living or asked), image


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        COLUMN_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
