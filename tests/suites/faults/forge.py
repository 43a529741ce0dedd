"""A forge with faults injected: `python -m tests.suites.faults.forge PLAN LOG FD`.

The plan is a file that is read anew for every request, so that one forge serves many plans; each
call, and the fault it got, is appended to the log. Else it is the forge (`linux.forge.child`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linux.forge import child as forge_child
from tests.suites.faults.faults import FORGE_KILLED, CallSite, Fault, FaultInjector
from transport.calls import hook_syscalls


class ForgeFaultInjector(FaultInjector):
    """One that asks anew what to do whenever the forge may have begun something new."""

    def __init__(self, plan: Path, log: Path) -> None:
        super().__init__(who="forge", on_pass=self._tell, interferences={FORGE_KILLED: self._die})
        self._plan_path = plan
        self._log_path = log
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._life: int | None = None
        self._ask()

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        self._ask()
        return super().__call__(function, args, kwargs)

    def _ask(self) -> None:
        said = json.loads(self._plan_path.read_text())
        if said["life"] != self._life:
            self._life = said["life"]
            self.plan = tuple(map(Fault.of_json, said["plan"]))
            self._counts.clear()
            if any(fault.kind == FORGE_KILLED for fault in self.plan) and self._has_died():
                self.plan = ()  # it is the forge after that one

    def _has_died(self) -> bool:
        lines = map(json.loads, self._log_path.read_text().splitlines())
        return any(life == self._life and said[-1] == FORGE_KILLED for life, said in lines)

    @staticmethod
    def _die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _tell(self, call: CallSite) -> None:
        fault = next((fault for fault in self.plan if fault.call == call), None)
        line = [self._life, Fault(call, fault.kind if fault else "").as_json()]
        os.write(self._log, json.dumps(line).encode() + b"\n")


def main() -> None:
    _, plan, log, number = sys.argv
    sys.argv = [sys.argv[0], number]
    with hook_syscalls(ForgeFaultInjector(Path(plan), Path(log))):
        forge_child.main()


if __name__ == "__main__":
    main()
