"""The two forms of the consumer behind one face, so that one test holds both to the same."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

from statemachine.messages import NamespaceRequest
from transport.descriptors import Inspector
from transport.request import AsyncConsumer, AsyncHandoff, Consumer, Handoff

POLL_S: Final = 0.001


class Blocking:
    """`Consumer`, as it is."""

    def __init__(self, path: Path, inspector: Inspector, **options: Any) -> None:
        self.consumer = Consumer(path, inspector, **options)

    def obtain(self, request: NamespaceRequest) -> Handoff:
        return self.consumer.obtain(request)

    def close(self) -> None:
        self.consumer.close()


class Awaiting:
    """`AsyncConsumer`, in a loop that runs while something is asked of it."""

    def __init__(self, path: Path, inspector: Inspector, **options: Any) -> None:
        self.consumer = AsyncConsumer(path, inspector, **options)
        self.runner = asyncio.Runner()
        self.faults: list[str] = []
        self.runner.get_loop().set_exception_handler(
            lambda loop, context: self.faults.append(repr(context))
        )

    def obtain(self, request: NamespaceRequest) -> AwaitedHandoff:
        return AwaitedHandoff(self.runner, self.runner.run(self.consumer.obtain(request)))

    def close(self) -> None:
        self.runner.close()
        assert not self.faults, self.faults


class AwaitedHandoff:
    """An `AsyncHandoff` that can be used like a `Handoff`."""

    def __init__(self, runner: asyncio.Runner, handoff: AsyncHandoff) -> None:
        self._runner = runner
        self._handoff = handoff

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handoff, name)

    def wait_ended(self, timeout_s: float) -> bool:
        self._within(timeout_s, self._handoff.wait_ended())
        return self._handoff.is_ended

    def end(self, timeout_s: float = 10.0) -> bool:
        return self._within(timeout_s, self._handoff.end())

    def settle(self, timeout_s: float = 2.0) -> bool:
        async def debt_paid() -> None:
            while self._handoff.is_in_debt:
                await asyncio.sleep(POLL_S)

        return self._within(timeout_s, debt_paid())

    def close(self) -> None:
        self._runner.run(self._handoff.close())

    def __enter__(self) -> AwaitedHandoff:
        self._runner.run(self._handoff.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runner.run(self._handoff.__aexit__(kind, error, trace))

    def _within(self, timeout_s: float, work: Any) -> bool:
        async def limited() -> bool:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(work, timeout_s)
                return True
            return False

        return self._runner.run(limited())


Form: TypeAlias = type[Blocking] | type[Awaiting]

FORMS: Final[tuple[Form, ...]] = (Blocking, Awaiting)


class Stopwatch:
    """How long the block took."""

    def __enter__(self) -> Stopwatch:
        self._start = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._start
