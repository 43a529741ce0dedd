"""
Writes the golden vectors for other languages: `python -m specs._build.make_vectors`, or `--check`.

The cases come from `golden`; here they become files: a folder for each family, in it its manifest
and its cases, one a line. Equal code writes equal bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from specs._build import clauses
from specs._build.golden import frames, invalid, lives, reads, rules
from specs._build.golden.wire import VectorCase

ROOT: Final = Path(__file__).resolve().parents[2]
"""The project's folder."""

SCHEMA: Final = 1
"""Version of the files; it changes when a reader of them would have to."""

FILE_BYTES_MAX: Final = 600_000
"""Longest file of cases; a longer family has several."""

VECTORS: Final = ROOT / "specs" / "vectors"
"""Where they are written."""


@dataclass(frozen=True)
class VectorFamily:
    """Cases of one kind."""

    name: str
    says: str
    passes: str
    """What an implementation does that passes."""
    fields: Mapping[str, str]
    """What stands in a case, besides its id."""
    cases: Callable[[], Iterator[VectorCase]]
    words: Mapping[str, str] = field(default_factory=dict)
    """The words that stand for something in a field, and what."""
    clauses: str = ""


_MESSAGE: Final = "a message as JSON: its name, and its fields in the order of the wire"
_FRAME: Final = "the whole frame, header included, in hex"

FAMILIES: Final = (
    VectorFamily(
        "frames",
        "every message in the one form in which it is written",
        "writing `message` gives `frame`, byte for byte; reading `frame` gives `message`",
        {"message": _MESSAGE, "frame": _FRAME},
        frames.frames,
        clauses="WIRE-3 WIRE-6 WIRE-7",
    ),
    VectorFamily(
        "accepted",
        "frames that no sender writes and every receiver reads",
        "reading `frame` gives `message`",
        {"frame": _FRAME, "message": _MESSAGE},
        frames.accepted,
        clauses="WIRE-8",
    ),
    VectorFamily(
        "invalid",
        "frames that are refused",
        "reading `frame` is refused with `FdPassing`, for one of `faults`, and the connection is "
        "closed; nothing more needs to come",
        {"frame": _FRAME, "faults": "what may be found wrong with it"},
        invalid.invalid,
        invalid.FAULTS,
        "WIRE-4 WIRE-9 WIRE-11",
    ),
    VectorFamily(
        "segments",
        "streams of frames, cut into reads at any byte",
        "after read *i*, `whole[i]` of `messages` have come out, in this order; at `refused` the "
        "reader refuses, and takes nothing any more",
        {
            "reads": "what each read returned, in hex",
            "messages": "the messages that come out, in order",
            "whole": "for each read, how many have come out once it is done",
            "refused": "the index of the read that makes the stream unreadable, or null",
            "pending": "bytes of an unfinished frame at the end; 0 when refused",
        },
        reads.segments,
        clauses="WIRE-4 WIRE-5",
    ),
    VectorFamily(
        "descriptors",
        "reads with descriptors, and which frame each descriptor belongs to",
        "exactly `deliveries` come out, each with these descriptors in this order, after this "
        "read; then comes the refusal, if there is one; every descriptor not delivered is closed",
        {
            "side": "`consumer` or `provider`: who reads",
            "reads": "for each `recvmsg`: its bytes in hex, how many descriptors came with it "
            "(numbered from 0 through the whole case), whether MSG_CTRUNC was set",
            "deliveries": "message, the numbers of its descriptors, after which read",
            "refused": "null, or the read at which the reader refuses, for one of `faults`",
        },
        reads.descriptors,
        reads.DESCRIPTOR_FAULTS,
        "FD-3 FD-4 FD-7 FD-9 FD-10 FD-11",
    ),
    VectorFamily(
        "requests",
        "the first message to a provider that is ready and has nothing, and its answer",
        "the provider answers with `answer` (`NamespaceResponse`: once the namespaces are made); "
        "after `FdPassing` it closes the connection",
        {
            "message": _MESSAGE,
            "answer": "the answer's name; of a `NamespaceError` its kind",
            "objection": "why it is not granted, or null",
        },
        rules.requests,
        rules.OBJECTIONS,
        "WIRE-11 LIFE-10 LIFE-11 LIFE-12 END-13 END-19",
    ),
    VectorFamily(
        "answers",
        "a message to a consumer that has asked, and which event of its lifecycle that is",
        "the consumer takes `message` for `event`",
        {"request": "what it has asked", "message": _MESSAGE, "event": "what that means"},
        rules.answers,
        rules.MEANINGS,
        "WIRE-11 WIRE-15 FD-2 ERR-5 ERR-6",
    ),
    VectorFamily(
        "provider",
        "lives of a provider, event by event",
        "each event has these effects, and leaves each allocation in this state",
        {
            "limits": "the limits that are not the usual ones",
            "remembered": "names released before this provider started, oldest first",
            "steps": "for each event: its effects, and the state of every allocation named so far",
        },
        lives.provider,
        clauses="WIRE-14 WIRE-16 LIFE-2 LIFE-3 LIFE-4 LIFE-5 LIFE-6 LIFE-7 LIFE-13 LIFE-14 END-2 "
        "END-3 END-12 END-13 END-16 END-17 END-18 CRASH-2 CRASH-3 CRASH-4 CRASH-6 PEER-2 PEER-4 "
        "PEER-5 PEER-6",
    ),
    VectorFamily(
        "consumer",
        "lives of one allocation at its consumer, event by event",
        "each event has these effects, and leaves both tables in these states; where `effects` is "
        "null the provider may not say that now: nothing changes (and it is told `FdPassing`)",
        {
            "request": "what the consumer's caller wants",
            "steps": "for each event: its effects, the consumer's state, the notice's state",
        },
        lives.consumer,
        clauses="LIFE-1 SELF-8 SELF-9 SELF-10 SELF-11 END-15 CRASH-13 ERR-5 ERR-6",
    ),
)
"""In reading order."""


def files() -> dict[Path, bytes]:
    """Make every file, by its path below `VECTORS`, but for the README."""
    made: dict[Path, bytes] = {}
    for family in FAMILIES:
        made |= _files_of(family)
    return made


def _files_of(family: VectorFamily) -> dict[Path, bytes]:
    folder = Path(family.name)
    parts, listed = _parts(family), []
    made: dict[Path, bytes] = {}
    for number, lines in enumerate(parts, 1):
        content = b"".join(lines)
        name = f"{number}.jsonl"
        made[folder / name] = content
        digest = hashlib.sha256(content).hexdigest()
        listed.append({"file": name, "cases": len(lines), "sha256": digest})
    manifest = {
        "schema": SCHEMA,
        "family": family.name,
        "says": family.says,
        "passes": family.passes,
        "cases": sum(len(lines) for lines in parts),
        "files": listed,
        "fields": dict(family.fields),
        "words": dict(family.words),
        "clauses": family.clauses.split(),
    }
    made[folder / "manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    return made


def _parts(family: VectorFamily) -> list[list[bytes]]:
    """Write the cases as lines, in as many files as they need."""
    parts: list[list[bytes]] = [[]]
    room = FILE_BYTES_MAX
    for case in family.cases():
        line = json.dumps(case, separators=(",", ":")).encode() + b"\n"
        if len(line) > room:
            parts.append([])
            room = FILE_BYTES_MAX
        room -= len(line)
        parts[-1].append(line)
    return parts


# --- The README ----------------------------------------------------------------------------------

_PART: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def readme(text: str, made: Mapping[Path, bytes]) -> str:
    """Make the generated parts of the README anew."""
    manifests = [json.loads(made[Path(f.name) / "manifest.json"]) for f in FAMILIES]
    return _PART.sub(lambda m: f"{m[1]}\n{_PARTS[m[2]](manifests)}\n{m[3]}", text)


def _families(manifests: list[Any]) -> str:
    rows = [
        f"| [`{m['family']}`]({m['family']}/manifest.json) | {m['cases']:,} | {m['says']} |"
        for m in manifests
    ]
    total = sum(m["cases"] for m in manifests)
    return "\n".join(
        ["| family | cases | what |", "|---|---:|---|", *rows, f"| | {total:,} | |", ""]
    )


def _sections(manifests: list[Any]) -> str:
    return "\n".join(line for manifest in manifests for line in _section(manifest))


def _section(manifest: Any) -> Iterator[str]:
    """Describe a family: what is to be true of a case, and what stands in it."""
    yield f"### {manifest['family']}\n"
    yield f"You pass when {manifest['passes']}. ({_linked(manifest['clauses'])})\n"
    yield from ("| field | |", "|---|---|")
    yield from (f"| `{name}` | {said} |" for name, said in manifest["fields"].items())
    yield ""
    if manifest["words"]:
        yield from ("| word | |", "|---|---|")
        yield from (f"| `{word}` | {said} |" for word, said in manifest["words"].items())
        yield ""


def _linked(names: list[str]) -> str:
    known = clauses.clauses()
    return ", ".join(f"[{name}](../{known[name].chapter.name}#{name})" for name in names)


_PARTS: Final[Mapping[str, Callable[[list[Any]], str]]] = {
    "families": _families,
    "sections": _sections,
}


# --- Writing, and comparing ----------------------------------------------------------------------


def stale() -> dict[Path, bytes | None]:
    """Find what is not as it would be written: the path, and its content, or None if it must go."""
    made = files()
    text = (VECTORS / "README.md").read_text(encoding="utf-8")
    made[Path("README.md")] = readme(text, made).encode()
    wanted: dict[Path, bytes | None] = {VECTORS / path: content for path, content in made.items()}
    there = {*VECTORS.glob("*/*.jsonl"), *VECTORS.glob("*/manifest.json")}
    wanted |= dict.fromkeys(there - wanted.keys())
    return {path: new for path, new in wanted.items() if _content(path) != new}


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def write() -> list[Path]:
    """Write what is stale; return which files that were."""
    found = stale()
    for path, content in found.items():
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return [*found]


def main() -> int:
    """Write what is stale and name it, or only name it."""
    parser = argparse.ArgumentParser(description="Write the golden vectors of specs/vectors.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if stale")
    only_compares = parser.parse_args().check
    found = [*stale()] if only_compares else write()
    for path in found:
        print(f"{'stale' if only_compares else 'refreshed'} {path.relative_to(ROOT)}")
    return 1 if only_compares and found else 0


if __name__ == "__main__":
    sys.exit(main())
