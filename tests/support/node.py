"""Run verbs of the command on this node, as a program of `test_nodes`.

The node is whatever this program was started in: mounts, namespaces, rights. Prints one JSON
object: exit status and output of each verb. A provider serves meanwhile, if it can.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from subprocess import CompletedProcess

from tests.support.programs import Daemon, nshandoff, running, wait_until

CommandResult = tuple[int, str]
"""Exit status, and all that was printed."""


class Verbs:
    """Each method runs the verb of its name."""

    def __init__(self, name: str, directory: Path, image_root: Path) -> None:
        self.name = name
        self.daemon = Daemon(directory, image_root)

    def serve(self) -> CommandResult:
        daemon = self.daemon
        daemon.begin()
        wait_until(lambda: not daemon.is_running() or '"event": "ready"' in daemon.log.read_text())
        return 0 if daemon.is_running() else daemon.stop(), daemon.log.read_text()

    def request(self) -> CommandResult:
        """With `list` and `doctor` while the allocation is alive."""
        words = ("--socket", self.daemon.socket, "--fallback", "never", "--namespaces", "pid,net")
        with running("request", *words, "--id", f"{self.name}-request", "--end") as program:
            assert program.stdout is not None
            shown = program.stdout.readline()
            looked = [
                nshandoff(verb, "--state-dir", self.daemon.state_dir) for verb in ("list", "doctor")
            ]
            program.send_signal(signal.SIGTERM)
            more, complaint = program.communicate()
        return program.returncode, "".join(
            [
                shown,
                more,
                complaint,
                *(f"{one.returncode}: {one.stdout}{one.stderr}" for one in looked),
            ]
        )

    def run(self) -> CommandResult:
        return self._run(self.daemon.socket, "--fallback", "never")

    def image(self) -> CommandResult:
        return self._run(self.daemon.socket, "--fallback", "never", "--uenv", "hello.sqfs")

    def alone(self) -> CommandResult:
        """`run` without a provider."""
        return self._run(self.daemon.socket.with_name("absent"))

    def demo(self) -> CommandResult:
        return outcome(nshandoff("demo"))

    def _run(self, socket: Path, *words: str) -> CommandResult:
        look = ("sh", "-c", 'echo "pid $$"; cat "$0" 2>/dev/null; true')
        text = self.daemon.uenv_base / "hello" / "hello.txt"
        kinds = ("--namespaces", "pid,net,mount", "--id", f"{self.name}-run")
        return outcome(nshandoff("run", "--socket", socket, *kinds, *words, "--", *look, text))


def outcome(done: CompletedProcess[str]) -> CommandResult:
    return done.returncode, done.stdout + done.stderr


def main(name: str, directory: str, image_root: str, *wanted: str) -> None:
    verbs = Verbs(name, Path(directory), Path(image_root))
    try:
        found = {verb: getattr(verbs, verb)() for verb in wanted}
    finally:
        if verbs.daemon.is_running():
            verbs.daemon.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
