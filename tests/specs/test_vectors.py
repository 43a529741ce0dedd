"""The golden vectors are fresh, our code and the model agree, and another language reads them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from specs import model, vectors
from specs._build import clauses, make_vectors
from specs._build.golden.lives import plain_effect
from specs._build.golden.wire import VectorCase
from statemachine import consumer as consumer_module
from statemachine import lifecycle
from statemachine import provider as provider_module
from statemachine.consumer import ConsumerKernel
from statemachine.effects import CreateNamespaces, Effect, Refuse
from statemachine.errors import NAMESPACE_ERRORS, FdPassing, RemoteProtocolError
from statemachine.events import (
    ConnectionOpened,
    EndReceived,
    Event,
    FrameRejected,
    ProviderReady,
    RequestReceived,
)
from statemachine.messages import NamespaceRequest, NamespaceType, objection
from statemachine.provider import Limits, ProviderKernel
from statemachine.testing.tables import HOMES
from tests.transport.test_codec import VECTORS as PEER_VECTORS
from tests.transport.test_codec import message_of
from transport import channel as channel_module
from transport.channel import Channel, Delivery, Reception, Rejected
from transport.codec import decode_message, encode_message
from transport.descriptors import Descriptor
from transport.framing import FrameReader, encode_frame
from transport.trace import records as trace

VECTORS = vectors.FOLDER
NAMES = [family.name for family in make_vectors.FAMILIES]


def failing(name: str, check: Callable[[VectorCase], bool]) -> list[str]:
    """The ids of the cases of a family of which something is not true."""
    return [case["id"] for case in vectors.cases(name) if not check(case)]


# --- The files -----------------------------------------------------------------------------------


def test_basic_files_are_what_the_generator_writes() -> None:
    stale = [str(path.relative_to(VECTORS)) for path in make_vectors.stale()]

    assert stale == [], "run: python -m specs._build.make_vectors"


def test_a_stale_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "vectors"
    shutil.copytree(VECTORS, copy)
    monkeypatch.setattr(make_vectors, "VECTORS", copy)
    changed, gone, foreign = (copy / "answers" / f for f in ("1.jsonl", "manifest.json", "2.jsonl"))
    content = changed.read_bytes()
    changed.write_bytes(content.replace(b"EndAnnounced", b"EndDenounced", 1))
    gone.unlink()
    foreign.write_bytes(b"")

    stale = make_vectors.stale()

    assert stale.keys() == {changed, gone, foreign}
    assert stale[changed] == content
    assert stale[foreign] is None


def test_there_are_enough_and_every_one_has_its_own_name() -> None:
    ids = [case["id"] for name in NAMES for case in vectors.cases(name)]

    assert len(ids) >= 2000
    assert [case for case, count in Counter(ids).items() if count > 1] == []
    assert {case.partition("/")[0] for case in ids} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_describes_its_files(name: str) -> None:
    manifest = vectors.manifest(name)
    contents = {f["file"]: (VECTORS / name / f["file"]).read_bytes() for f in manifest["files"]}

    assert {path.name for path in (VECTORS / name).iterdir()} == {*contents, "manifest.json"}
    for file in manifest["files"]:
        content = contents[file["file"]]
        assert content.count(b"\n") == file["cases"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert len(content) <= make_vectors.FILE_BYTES_MAX
    assert sum(file["cases"] for file in manifest["files"]) == manifest["cases"]
    assert {tuple(case) for case in vectors.cases(name)} == {("id", *manifest["fields"])}


def test_every_word_of_a_manifest_is_used() -> None:
    keys = {"invalid": "faults", "requests": "objection", "answers": "event"}
    for name, key in keys.items():
        said = {w for case in vectors.cases(name) for w in _listed(case[key]) if w is not None}
        assert said == vectors.manifest(name)["words"].keys(), name
    refusals = [case["refused"] for case in vectors.cases("descriptors") if case["refused"]]
    said = {word for refused in refusals for word in refused["faults"]}
    assert said == vectors.manifest("descriptors")["words"].keys()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_every_clause_of_a_manifest_is_there() -> None:
    known = clauses.clauses()
    for name in NAMES:
        named = vectors.manifest(name)["clauses"]
        assert named, name
        assert [clause for clause in named if clause not in known] == [], name


def test_the_real_peers_bytes_are_among_them() -> None:
    written = {case["frame"]: case["message"] for case in vectors.cases("frames")}
    read = {case["frame"]: case["message"] for case in vectors.cases("accepted")}

    for vector in PEER_VECTORS:
        assert written[encode_frame(vector.named).hex()] == vector.document, vector.name
        assert read[encode_frame(vector.compact).hex()] == vector.document, vector.name


# --- Our code: the wire --------------------------------------------------------------------------

FAULTS: Final = {
    "announces 0 bytes": "length-zero",
    "announces": "length-over-limit",
    "incomplete input": "truncated",
    "more bytes follow": "trailing",
    "0xc1": "not-messagepack",
    "not UTF-8": "not-utf-8",
    "max_ext_len|extension type": "extension",
    "nested": "too-deep",
    "max_array_len|max_map_len": "too-many",
    "a key must be text": "key-type",
    "stands there twice": "duplicate-key",
    r"map of one entry, not of \d": "entries",
    "is not the name of a message": "unknown-message",
    "is not a kind of NamespaceError": "unknown-error",
    "must be Pid, Net, Mount": "unknown-type",
    r"has \d fields, not": "field-count",
    "lacks": "missing-field",
    "must be": "wrong-type",
}
DESCRIPTOR_FAULTS: Final = {
    r"announces \d descriptors and came with": "descriptors-count",
    "cut off": "descriptors-cut-off",
    "came later": "descriptors-late",
    "came twice": "descriptors-twice",
    "none are accepted here": "descriptors-refused",
}
OBJECTIONS: Final = {
    r"allocation_id has \d+ bytes": "id-size",
    "slash or a control character": "id-characters",
    "a name that the kernel reserves": "id-reserved",
    "repeats": "types-repeated",
    "needs a Mount namespace": "image-without-mount",
    "uenv_image must have": "image-size",
    "has a control character": "image-characters",
    "not a plain path": "image-path",
}


def word_for(reason: str, words: Mapping[str, str]) -> str:
    """The stable word for what one of our reasons says."""
    return next(word for pattern, word in words.items() if re.search(pattern, reason))


def body_of(case: VectorCase) -> bytes:
    frame = bytes.fromhex(case["frame"])
    reader = FrameReader()
    reader.feed(frame)
    whole = reader.take()
    assert whole is not None
    assert not reader.is_partial
    return whole.body


def is_written_and_read(case: VectorCase) -> bool:
    message, body = message_of(case["message"]), body_of(case)
    return encode_message(message) == body and decode_message(body) == message


def is_read_only(case: VectorCase) -> bool:
    message, body = message_of(case["message"]), body_of(case)
    return encode_message(message) != body and decode_message(body) == message


def is_refused(case: VectorCase) -> bool:
    try:
        decode_message(body_of(case))
    except FdPassing as error:
        return word_for(error.reason, FAULTS) in case["faults"]
    return False


def comes_out_in_time(case: VectorCase) -> bool:
    reader, messages, whole, refused = FrameReader(), [], [], None
    for index, read in enumerate(case["reads"]):
        reader.feed(bytes.fromhex(read))
        try:
            while refused is None and (frame := reader.take()) is not None:
                messages.append(decode_message(frame.body))
        except FdPassing:
            refused = index
        whole.append(len(messages))
    pending = reader.bytes_fed - sum(len(encode_frame(encode_message(m))) for m in messages)
    expected = [message_of(document) for document in case["messages"]]
    return (messages, whole, refused, 0 if refused is not None else pending) == (
        expected,
        case["whole"],
        case["refused"],
        case["pending"],
    )


class ScriptedReads:
    """Reads that are not made but told, one for each call of `Channel.receive`."""

    def __init__(self, reads: Sequence[Any]) -> None:
        self._reads = [r for read in reads for r in (read, None)]
        self.inodes: list[int] = []

    def receive_once(self, sock: socket.socket, size: int, descriptors_max: int) -> Reception:
        read = self._reads.pop(0)
        if read is None:
            raise BlockingIOError
        brought = [Descriptor(os.memfd_create("test")) for _ in range(read["descriptors"])]
        self.inodes += [os.fstat(descriptor.fileno()).st_ino for descriptor in brought]
        return Reception(bytes.fromhex(read["bytes"]), brought, read["cut_off"])


def is_attributed(case: VectorCase) -> bool:
    script = ScriptedReads(case["reads"])
    deliveries: list[Any] = []
    refused = None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with (
        theirs,
        Channel(ours, accepts_descriptors=case["side"] == "consumer") as channel,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(channel_module, "receive_once", script.receive_once)
        for index in range(len(case["reads"])):
            for received in channel.receive():
                if isinstance(received, Delivery):
                    with received.bundle as bundle:
                        inodes = [os.fstat(fd).st_ino for fd in bundle.filenos()]
                    numbers = [script.inodes.index(inode) for inode in inodes]
                    deliveries.append((received.message, numbers, index))
                else:
                    assert isinstance(received, Rejected)
                    refused = (index, word_for(received.error.reason, DESCRIPTOR_FAULTS))
    expected = [
        (message_of(d["message"]), d["descriptors"], d["after"]) for d in case["deliveries"]
    ]
    if (case["refused"] is None) != (refused is None) or deliveries != expected:
        return False
    after, word = refused or (None, None)
    return refused is None or (
        after == case["refused"]["after"] and word in case["refused"]["faults"]
    )


@pytest.mark.clause("FD-7", "FD-9")
def test_our_channel_agrees_and_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))

    assert failing("descriptors", is_attributed) == []
    assert len(os.listdir("/proc/self/fd")) == before


# --- Our code: what is asked and answered --------------------------------------------------------


def first_answer(event: Event) -> str:
    """What a provider that is ready and has nothing answers."""
    if isinstance(event, FrameRejected):
        return "FdPassing"
    kernel = ProviderKernel()
    kernel.receive(ConnectionOpened(1, 0))
    kernel.receive(ProviderReady())
    match kernel.receive(event):
        case (CreateNamespaces(),):
            return "NamespaceResponse"
        case (Refuse(error=error),):
            return error.kind
    raise AssertionError(event)


def objection_to(event: Event) -> str | None:
    match event:
        case RequestReceived(request=request):
            reason = objection(request)
            return reason and word_for(reason, OBJECTIONS)
        case EndReceived():
            return "end-of-unknown"
        case FrameRejected(reason=reason):
            return word_for(reason, {**OBJECTIONS, "not for the provider": "not-for-a-provider"})
    raise AssertionError(event)


def is_answered(case: VectorCase) -> bool:
    event = provider_module.event_of(1, message_of(case["message"]))
    return (first_answer(event), objection_to(event)) == (case["answer"], case["objection"])


def is_understood(case: VectorCase) -> bool:
    request = message_of(case["request"])
    assert isinstance(request, NamespaceRequest)
    event = consumer_module.event_of(request, message_of(case["message"]))
    return type(event).__name__ == case["event"]


# --- Our code, and the model: lives --------------------------------------------------------------


READY: Final = {"ProviderReady": {}}


def turn_from(event: Any, effects: Sequence[Any] = ()) -> trace.Turn:
    """Read an event and its effects as a trace is read."""
    done: Any = trace.decode_event(event)
    return trace.Turn(done, tuple(map(trace.decode_effect, effects)))


def event_from(plain: Any) -> Event:
    return turn_from(plain).event


def effect_from(plain: Any) -> Effect:
    """Read an effect; words that the vectors leave open are empty here."""
    worded = json.loads(json.dumps(plain), object_hook=_with_words)
    return turn_from(READY, [worded]).effects[0]


def _with_words(content: dict[str, Any]) -> dict[str, Any]:
    worded = {"reason", *(kind.kind for kind in NAMESPACE_ERRORS)}
    return {k: "" if v is None and k in worded else v for k, v in content.items()}


def request_from(fields: Any) -> NamespaceRequest:
    types = tuple(map(NamespaceType, fields["namespaces"]))
    return NamespaceRequest(fields["allocation_id"], types, fields["uenv_image"])


def limits_from(plain: Any) -> dict[str, Any]:
    return {k: frozenset(v) if isinstance(v, list) else v for k, v in plain.items()}


def plain(effects: Sequence[Effect]) -> list[Any]:
    return [plain_effect(effect) for effect in effects]


def kernel_lives_so(case: VectorCase) -> bool:
    kernel = ProviderKernel(Limits(**limits_from(case["limits"])))
    kernel.remember(case["remembered"])
    return all(
        plain(kernel.receive(event_from(step["event"]))) == step["effects"]
        and {name: kernel.state_of(name).value for name in step["states"]} == step["states"]
        for step in case["steps"]
    )


def model_lives_so(case: VectorCase) -> bool:
    limits = model.Limits(**limits_from(case["limits"]))
    now = model.Provider(limits, remembered=tuple(case["remembered"][-limits.remembered :]))
    for step in case["steps"]:
        now, effects = model.provider_step(now, event_from(step["event"]))
        if model.differences(map(effect_from, step["effects"]), effects):
            return False
        if {name: now.state_of(name) for name in step["states"]} != step["states"]:
            return False
    return True


def consumer_lives_so(case: VectorCase) -> bool:
    kernel = ConsumerKernel(request_from(case["request"]))
    for step in case["steps"]:
        try:
            effects = plain(kernel.receive(event_from(step["event"])))
        except RemoteProtocolError:
            effects = None
        seen = (effects, kernel.state.value, kernel.notice.value)
        if seen != (step["effects"], step["state"], step["notice"]):
            return False
    return True


def consumer_model_lives_so(case: VectorCase) -> bool:
    now = model.Consumer(request_from(case["request"]))
    for step in case["steps"]:
        try:
            now, effects = model.consumer_step(now, event_from(step["event"]))
        except model.Impossible as impossible:
            if step["effects"] is not None or impossible.whose == "ours":
                return False
            continue
        if step["effects"] is None or model.differences(map(effect_from, step["effects"]), effects):
            return False
        if (now.state, now.notice) != (step["state"], step["notice"]):
            return False
    return True


@pytest.mark.clause("WIRE-5", "WIRE-6", "WIRE-8", "WIRE-9")
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("frames", is_written_and_read),
        ("accepted", is_read_only),
        ("invalid", is_refused),
        ("segments", comes_out_in_time),
        ("requests", is_answered),
        ("answers", is_understood),
        ("provider", kernel_lives_so),
        ("provider", model_lives_so),
        ("consumer", consumer_lives_so),
        ("consumer", consumer_model_lives_so),
    ],
)
def test_our_code_and_the_model_agree(name: str, check: Callable[[VectorCase], bool]) -> None:
    assert failing(name, check) == []


def test_every_row_of_every_table_has_a_case() -> None:
    taken: set[tuple[str, str, str]] = set()
    with HOMES.watched(lambda table, event, state: taken.add((table, event.__name__, state.value))):
        assert failing("provider", kernel_lives_so) == []
        assert failing("consumer", consumer_lives_so) == []

    rows = {(t.name, r.event.__name__, r.source.value) for t in lifecycle.TABLES for r in t.rows}
    assert rows - taken == set()


# --- Another language: specs/vectors/c ------------------------------------------------------------

SOURCES: Final = sorted((VECTORS / "c").glob("*.c"))
WARNINGS: Final = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-O1")
SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program, with sanitizers where they can be linked."""
    path = tmp_path_factory.mktemp("vectors") / "check"
    if compiled(path, *SANITIZERS).returncode:
        plainly = compiled(path)
        assert plainly.returncode == 0, plainly.stderr
    return path


def compiled(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["cc", *WARNINGS, *more, "-o", str(path), *map(str, SOURCES)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(program: Path, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, root], capture_output=True, text=True, check=False, timeout=60)


def test_the_c_program_runs_every_case_of_every_family(program: Path) -> None:
    ran = run(program, VECTORS)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    expected = {f"{name} {vectors.manifest(name)['cases']} cases, 0 failures" for name in NAMES}
    assert set(ran.stdout.splitlines()) == expected


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A copy of the vectors with two cases of each family."""
    for name in NAMES:
        lines = (VECTORS / name / "1.jsonl").read_bytes().splitlines(keepends=True)[:2]
        manifest = vectors.manifest(name) | {"cases": 2, "files": [{"file": "1.jsonl", "cases": 2}]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jsonl").write_bytes(b"".join(lines))
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


FLIPS: Final = {
    "frames": (b"alloc-42", b"alloc-43"),
    "accepted": (b"alloc-42", b"alloc-43"),
    "invalid": (b'"length-zero"', b'"length-zerp"'),
    "segments": (b'"whole":[1', b'"whole":[0'),
    "descriptors": (b'"descriptors":[0]', b'"descriptors":[1]'),
    "requests": (b"NamespaceResponse", b"NamespaceResponsf"),
    "answers": (b"ResponseReceived", b"ResponseReceivee"),
    "provider": (b'"created"', b'"greated"'),
    "consumer": (b'"connecting"', b'"connectinG"'),
}
"""One byte of what a case says, and what to put in its place."""


@pytest.mark.parametrize("name", NAMES)
def test_the_c_program_finds_a_flipped_byte(name: str, program: Path, few: Path) -> None:
    path = few / name / "1.jsonl"
    content = path.read_bytes()
    old, new = FLIPS[name]
    assert old in content.splitlines()[0]
    path.write_bytes(content.replace(old, new, 1))

    ran = run(program, few)

    assert ran.returncode == 1, ran.stderr
    failed = {line.split(": ")[0] for line in ran.stdout.splitlines() if "FAILED" in line}
    assert failed == {f"FAILED {json.loads(content.splitlines()[0])['id']}"}


@pytest.mark.parametrize("name", NAMES)
def test_the_c_program_misses_a_case_that_is_not_there(name: str, program: Path, few: Path) -> None:
    path = few / name / "1.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])

    ran = run(program, few)

    assert ran.returncode == 1
    assert f"FAILED {name}: 1 cases; the manifest says 2" in ran.stdout


def test_the_c_program_misses_a_file_and_a_family(program: Path, few: Path) -> None:
    (few / "frames" / "2.jsonl").write_bytes(b"")
    (few / "answers" / "manifest.json").unlink()
    (few / "later").mkdir()
    (few / "later" / "manifest.json").write_text("{}")

    ran = run(program, few)

    assert ran.returncode == 1
    failed = [line for line in ran.stdout.splitlines() if "FAILED" in line]
    assert sorted(failed) == [
        "FAILED answers: a family that is missing",
        "FAILED frames: 1 files in the manifest; 2 are there",
        "FAILED later: a family that is not known here",
    ]


def test_the_c_program_does_not_go_on_without_a_file(program: Path, few: Path) -> None:
    (few / "frames" / "1.jsonl").unlink()

    ran = run(program, few)

    assert ran.returncode == 2
    assert ran.stderr == "frames/1.jsonl: cannot be opened\n"
