"""Runs every block of a chapter (with `sybil`); a kind of block that cannot be run is an error.

`python`   runs; what follows `>>>` must print what stands below. Names carry over in a chapter.
           One that begins with `# name.py` is that file, for the shell of the chapter.
`hex`      bytes with a remark behind each line; the last line, `= ...`, is what they mean.
`console`  lines after `$` (and `>`) are typed into one shell per chapter, in a folder of its own;
           what stands below them must come out. `…` is anything, alone on a line any lines.
`mermaid`  is drawn from the code, so it must stand in a generated part (`specs/_build/refresh.py`).
`text`     is a form or a picture to look at; it is not run, so it must say nothing else.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from statemachine import errors, messages
from transport.codec import decode_message
from transport.framing import FrameReader

ROOT: Final = Path(__file__).resolve().parents[2]
KINDS: Final = frozenset({"python", "hex", "console", "mermaid", "text"})
COMMAND_TIMEOUT_S: Final = 30.0

_FENCE: Final = re.compile(r"^```([^\n]*)\n.*?^```", re.MULTILINE | re.DOTALL)
_BYTES: Final = re.compile(r"(?:[0-9a-f]{2}(?: +|$))*")
_FILE: Final = re.compile(r"# (\w+\.py)\n")
_SYSTEM: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PART: Final = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)


def run(chapter: Path, programs: Path | None = None) -> int:
    """
    Run the blocks of a chapter, from the first to the last.

    Args:
        chapter: which.
        programs: where `python` and what is installed with it is; None: here, with this tree.

    Returns:
        How many there were.

    Raises:
        Exception: a block does not do what the chapter says; with its file and line.
    """
    shell = Shell(programs)
    parsers = [
        PythonCodeBlockParser(future_imports=["annotations"]),
        CodeBlockParser("hex", _evaluate_hex),
        CodeBlockParser("console", shell.evaluate),
    ]
    count = 0
    try:
        for example in Document.parse(str(chapter), *parsers).examples():
            file = _FILE.match(str(example.parsed))
            if file is None:
                example.evaluate()
            else:
                (shell.folder / file[1]).write_text(str(example.parsed), encoding="utf-8")
            count += 1
    finally:
        shell.close()
    return count


def objections(chapter: Path) -> list[str]:
    """Find the blocks that are neither run nor drawn."""
    text = chapter.read_text(encoding="utf-8")
    foreign = [kind for kind in _FENCE.findall(text) if kind not in KINDS]
    found = [f"a block of {kind!r} cannot be run" for kind in foreign]
    by_hand = _FENCE.findall(_PART.sub("", text)).count("mermaid")
    return found + ["a diagram that is not drawn from the code"] * by_hand


def _evaluate_hex(example: Example) -> str | None:
    """Take the frame apart that the bytes are, and compare it with what the last line says."""
    *lines, meaning = str(example.parsed).rstrip().splitlines()
    data = b"".join(bytes.fromhex(_BYTES.match(line)[0]) for line in lines)  # type: ignore[index]
    reader = FrameReader()
    reader.feed(data)
    frame = reader.take()
    if frame is None or reader.is_partial or not meaning.startswith("= "):
        return "these are not the bytes of one frame, with its meaning below"
    found = decode_message(frame[0])
    expected = eval(meaning.removeprefix("= "), {**vars(messages), **vars(errors)})
    return None if found == expected else f"the bytes mean {found!r}"


class Shell:
    """The shell of a chapter, started when it is first needed; whatever runs in it ends with it."""

    def __init__(self, programs: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nsh-book-")
        self.folder = Path(self._folder.name)
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None

    def evaluate(self, example: Example) -> str | None:
        """Type the commands of a block, and compare what comes out."""
        for command, expected in _commands(str(example.parsed)):
            said = self._type(command)
            if not _matches(said, expected):
                return f"$ {command}\nsays\n{said}\nand not\n{expected}"
        return None

    def close(self) -> None:
        """End everything that was started in it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(COMMAND_TIMEOUT_S)
            finally:
                for pipe in (self._process.stdin, self._process.stdout):
                    if pipe is not None:
                        pipe.close()
        self._folder.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        programs = self._programs or Path(sys.executable).parent
        tree = {"TREE": str(ROOT), "PYTHONPATH": str(ROOT)} if self._programs is None else {}
        # Ending by a signal is not to look like a failure; what it started gets the signal as well.
        return subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=self._folder.name,
            env={"PATH": f"{programs}:{_SYSTEM}", "HOME": "/", "COLUMNS": "100", **tree},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _type(self, command: str) -> str:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        mark = b"\x04done\n"
        process.stdin.write(f"{command}\necho $'\\004done'\n".encode())
        process.stdin.flush()
        said, deadline = b"", time.monotonic() + COMMAND_TIMEOUT_S
        while not said.endswith(mark):
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([process.stdout], [], [], left_s)[0]:
                raise TimeoutError(
                    f"$ {command}\nis not done after {COMMAND_TIMEOUT_S:g} s: {said!r}"
                )
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                raise EOFError(f"$ {command}\nended the shell: {said!r}")
            said += part
        return said.removesuffix(mark).decode()


def _commands(block: str) -> list[tuple[str, str]]:
    """Take a block apart into commands (which `> ` continues) and what is to come out of each."""
    found: list[list[str]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append([line.removeprefix("$ "), ""])
        elif line.startswith("> ") and found and not found[-1][1]:
            found[-1][0] += "\n" + line.removeprefix("> ")
        else:
            found[-1][1] += line + "\n"
    return [(command, expected) for command, expected in found]


def _matches(said: str, expected: str) -> bool:
    lines = [
        r"(?:.*\n)*" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
        for line in expected.splitlines()
    ]
    return re.fullmatch("".join(lines), said) is not None
