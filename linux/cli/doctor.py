"""`nshandoff doctor`: say what is alive, dead or unknown on the node, and release what is dead."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from ..doctor import Finding, examine, repair
from ..features import Features
from ..journal import JournalError
from ..syscalls import SyscallError
from .exits import ExitCode, Failure, ended_by_sigpipe

SCHEMA: Final = 1
"""Version of what `--json` prints; keys are added without a new one, never changed."""


@ended_by_sigpipe()
def doctor(options: argparse.Namespace) -> ExitCode:
    """
    Print what was found, after a repair if one was asked for.

    Returns:
        OK if nothing needs attention, NO if something does.

    Raises:
        Failure: ENVIRONMENT, there is no such state directory, or something cannot be read.
    """
    state_dir, features = Path(options.state_dir), Features.probe()
    try:
        findings = examine(state_dir, features)
        done: list[str] = []
        if options.repair:
            done = repair(findings, state_dir, features)
            findings = examine(state_dir, features)
    except (JournalError, SyscallError) as error:
        raise Failure(ExitCode.ENVIRONMENT, str(error), type(error).__name__) from error
    if options.json:
        print(json.dumps(_as_json(findings, done, state_dir)))
    else:
        print("\n".join(_as_text(findings, done)))
    return ExitCode.NO if any(it.needs_attention for it in findings) else ExitCode.OK


def _as_json(findings: list[Finding], done: list[str], state_dir: Path) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "state_dir": str(state_dir),
        "repaired": done,
        "findings": [
            {
                "what": it.what,
                "verdict": it.verdict.value,
                "why": it.why,
                "advice": it.advice,
                "needs_attention": it.needs_attention,
                "is_repairable": it.is_repairable,
            }
            for it in findings
        ],
    }


def _as_text(findings: list[Finding], done: list[str]) -> list[str]:
    lines = list(done)
    for it in findings:
        lines.append(f"{it.verdict.value:8}{it.what}: {it.why}")
        if it.advice is not None:
            lines.append(f"{'':8}-> {it.advice}")
    if not any(it.needs_attention for it in findings):
        lines.append("nothing needs attention")
    return lines
