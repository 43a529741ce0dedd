"""Both forms of the consumer behind one interface, so that one test holds both to the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from transport.request import AsyncConsumer, AsyncHandoff, Consumer


class Awaited:
    """An object of the asyncio form, used like one of the blocking form."""

    def __init__(self, runner: asyncio.Runner, inner: Any) -> None:
        self._runner = runner
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._blocking(found) if asyncio.iscoroutinefunction(found) else found

    def __repr__(self) -> str:
        return repr(self._inner)

    def _blocking(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = self._runner.run(verb(*arguments, **options))
            return Awaited(self._runner, result) if isinstance(result, AsyncHandoff) else result

        return call

    def __enter__(self) -> Awaited:
        self._runner.run(self._inner.__aenter__())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._runner.run(self._inner.__aexit__(*exc_info))


class Awaiting(Awaited):
    """`AsyncConsumer`, in a loop that runs while something is asked of it."""

    def __init__(self, *arguments: Any, form: Any = AsyncConsumer, **options: Any) -> None:
        super().__init__(asyncio.Runner(), form(*arguments, **options))
        self._is_closed = False
        self.faults: list[str] = []
        self._runner.get_loop().set_exception_handler(
            lambda loop, context: self.faults.append(repr(context))
        )

    def handoff_of(self, allocation_id: str) -> Awaited:
        return Awaited(self._runner, self._inner.handoff_of(allocation_id))

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._runner.run(self._inner.close())
            self._runner.close()
            assert not self.faults, self.faults


Form: TypeAlias = type[Consumer] | type[Awaiting]

FORMS: Final[tuple[Form, ...]] = (Consumer, Awaiting)


class Stopwatch:
    """How long the block took."""

    def __enter__(self) -> Stopwatch:
        self._start = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.seconds = time.monotonic() - self._start
