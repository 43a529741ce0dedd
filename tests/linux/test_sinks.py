"""A sink stops nothing: what cannot be written is lost and counted, and the count is told."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from linux.cli import command as cli
from linux.cli.exits import ExitCode
from linux.sinks import QUEUE_BYTES_MAX, SLOW_READER, Sink
from linux.syscalls import SyscallError
from tests.support.programs import wait_until
from tests.support.scarcity import fill_disk, fill_pipe
from transport.descriptors import Descriptor

LINE = b"x" * 99 + b"\n"

PipeEnds = tuple[Descriptor, Descriptor]


class Reports(list[tuple[int, str]]):
    """What a sink has reported."""

    def __call__(self, count: int, why: str) -> None:
        self.append((count, why))


def preface(count: int, why: str) -> bytes:
    return f"lost {count}\n".encode()


@pytest.fixture
def pipe() -> Iterator[PipeEnds]:
    """A pipe: its reading end, which does not block, and its writing end."""
    reading, writing = map(Descriptor, os.pipe())
    os.set_blocking(reading.fileno(), False)
    with reading, writing:
        yield reading, writing


def drain(reading: Descriptor) -> bytes:
    """Read what is in the pipe until nothing comes any more."""
    found = bytearray()
    quiet_s = time.monotonic() + 0.2
    while time.monotonic() < quiet_s:
        with suppress(BlockingIOError):
            if more := os.read(reading.fileno(), 1 << 16):
                found += more
                quiet_s = time.monotonic() + 0.2
    return bytes(found).lstrip(b"\0")


def test_basic_lines_arrive_in_order(pipe: PipeEnds) -> None:
    reading, writing = pipe
    sink = Sink(writing)
    for number in range(100):
        sink.write(b"%d\n" % number)
    assert sink.close()
    assert drain(reading).split() == [b"%d" % number for number in range(100)]
    sink.write(b"too late\n")
    assert sink.close()
    assert drain(reading) == b""


def test_a_line_may_be_made_in_the_thread_that_writes_it(pipe: PipeEnds) -> None:
    reading, writing = pipe
    sink = Sink(writing)
    makers = []

    def make() -> bytes:
        makers.append(threading.get_ident())
        return b"made\n"

    sink.write(b"first\n")
    sink.write(make)
    sink.write(b"last\n")
    assert sink.close()
    assert drain(reading) == b"first\nmade\nlast\n"
    assert makers != [threading.get_ident()]


@pytest.mark.clause("DAEMON-6")
def test_full_pipe_blocks_no_writer_and_its_losses_are_told_in_their_place(pipe: PipeEnds) -> None:
    reading, writing = pipe
    fill_pipe(writing.fileno())
    reports = Reports()
    sink = Sink(writing, preface=preface, report=reports)
    room = QUEUE_BYTES_MAX // len(LINE)
    began_s = time.monotonic()
    for _ in range(room + 7):
        sink.write(LINE)
    assert time.monotonic() - began_s < 1
    assert reports == [(0, SLOW_READER)]
    found = drain(reading)
    sink.write(b"next\n")
    found += drain(reading)
    assert sink.close()
    assert found == LINE * room + b"lost 7\nnext\n"
    assert reports == [(0, SLOW_READER), (7, SLOW_READER)]


def test_a_line_longer_than_the_queue_goes_through_alone(pipe: PipeEnds) -> None:
    reading, writing = pipe
    sink = Sink(writing)
    long = b"y" * (QUEUE_BYTES_MAX + 1) + b"\n"
    sink.write(long)
    sink.write(LINE)
    assert drain(reading) == long
    sink.write(LINE)
    assert drain(reading) == LINE
    assert sink.close()


def test_close_does_not_wait_for_a_reader_that_does_not_read(pipe: PipeEnds) -> None:
    reading, writing = pipe
    fill_pipe(writing.fileno())
    reports = Reports()
    sink = Sink(writing, report=reports)
    sink.write(LINE)
    began_s = time.monotonic()
    assert not sink.close(0.1)
    assert time.monotonic() - began_s < 1
    assert reports == [(1, SLOW_READER)]
    assert drain(reading) == LINE  # and so the thread ends
    assert sink.close()


def test_closed_pipe_loses_lines_and_raises_nothing(pipe: PipeEnds) -> None:
    reading, writing = pipe
    reading.close()
    reports = Reports()
    sink = Sink(writing, report=reports)
    for _ in range(3):
        sink.write(LINE)
        time.sleep(0.01)
    assert sink.close()
    assert [count for count, _ in reports] == [0, 3]
    assert all("EPIPE" in why for _, why in reports)


def test_non_blocking_file_is_waited_for(pipe: PipeEnds) -> None:
    reading, writing = pipe
    fill_pipe(writing.fileno())
    os.set_blocking(writing.fileno(), False)
    reports = Reports()
    sink = Sink(writing, report=reports)
    sink.write(LINE)
    time.sleep(0.05)
    assert drain(reading) == LINE
    assert (sink.close(), reports) == (True, [])


@pytest.mark.clause("DAEMON-6")
@pytest.mark.needs_root
def test_full_disk_loses_lines_until_there_is_room(small_disk: Path) -> None:
    """A line that was cut is ended before the next one, and counts as lost."""
    log = small_disk / "log"
    reports = Reports()
    with Descriptor(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)) as file:
        sink = Sink(file, preface=preface, report=reports)
        long = b"z" * 5000 + b"\n"
        sink.write(long)
        wait_until(lambda: log.stat().st_size == len(long))
        fillers = fill_disk(small_disk)
        for _ in range(3):
            sink.write(long)
            wait_until(lambda: not sink._bytes)
        cut = log.read_bytes()
        shutil.rmtree(fillers)
        sink.write(b"next\n")
        assert sink.close()
    assert not cut.endswith(b"\n")
    assert log.read_bytes() == cut + b"\nlost 3\nnext\n"
    assert [count for count, _ in reports] == [0, 3]
    assert all("no space or no inode left" in why for _, why in reports)


def test_what_was_cut_before_is_ended_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"half")
    with Descriptor(os.open(log, os.O_WRONLY | os.O_APPEND)) as file:
        sink = Sink(file, is_cut=True)
        sink.write(LINE)
        assert sink.close()
    assert log.read_bytes() == b"half\n" + LINE


@pytest.mark.clause("DAEMON-7")
def test_one_that_waits_has_written_when_it_returns_and_waits_once_only(pipe: PipeEnds) -> None:
    reading, writing = pipe
    sink = Sink(writing, wait_s=5.0)
    for _ in range(50):
        sink.write(LINE)
        assert os.read(reading.fileno(), 4096) == LINE
    assert sink.close()
    fill_pipe(writing.fileno())
    slow = Sink(writing, wait_s=0.1)
    began_s = time.monotonic()
    for _ in range(100):
        slow.write(LINE)
    assert 0.1 <= time.monotonic() - began_s < 1
    assert drain(reading) == LINE * 100
    assert slow.close()


def test_report_may_write_to_another_sink(pipe: PipeEnds) -> None:
    reading, writing = pipe
    log = Sink(writing)
    tell: Callable[[int, str], None] = lambda count, why: log.write(b"%d\n" % count)  # noqa: E731
    with Descriptor(os.open("/dev/full", os.O_WRONLY)) as full:
        trace = Sink(full, wait_s=1.0, report=tell)
        trace.write(LINE)
        trace.write(LINE)
        assert trace.close()
    assert log.close()
    assert drain(reading) == b"0\n2\n"


def test_without_its_thread_there_is_no_sink_and_a_provider_says_so(
    pipe: tuple[Descriptor, Descriptor],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(SyscallError, match=r"pthread_create\(3\)"):
        Sink(pipe[1])
    assert cli.main(["serve", "--socket", str(tmp_path / "socket")]) == ExitCode.ENVIRONMENT
    assert "no thread left" in capfd.readouterr().err
