"""A backend that can be held up, and be short of descriptors, where it is to be disturbed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from statemachine.errors import FdPassing
from statemachine.messages import NamespaceRequest, NamespaceResponse

from ..contract import Backend, Recovery
from ..descriptors import DescriptorBundle
from .adapter import StalledWork
from .peer import DEADLINE_S


class GatedBackend:
    """
    A backend, and a hand on it; fulfils `transport.contract.Backend`.

    Work that is held up waits in the thread that does it. A program with only one thread asks
    `is_held` instead, and leaves the work alone.

    Args:
        backend: lent.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._held: set[tuple[StalledWork, str]] = set()
        self._waiting: list[tuple[StalledWork, str]] = []
        self._changed = threading.Condition()
        self._has_descriptors = True

    def hold(self, work: StalledWork, name: str = "") -> None:
        """Hold up work on one allocation, or on all."""
        with self._changed:
            self._held.add((work, name))

    def is_held(self, work: StalledWork, name: str = "") -> bool:
        return not self._held.isdisjoint({(work, name), (work, "")})

    def let_go(self, work: StalledWork, name: str = "") -> None:
        with self._changed:
            self._held.discard((work, name))
            self._changed.notify_all()

    def wait_held(self, work: StalledWork, name: str = "") -> None:
        """Wait until work on one allocation is held up, or on any."""

        def has_arrived() -> bool:
            return any(what is work and name in ("", whose) for what, whose in self._waiting)

        with self._changed:
            arrived = self._changed.wait_for(has_arrived, DEADLINE_S)
        assert arrived, f"{work} does not begin"

    @contextmanager
    def scarcity(self) -> Iterator[None]:
        """Meanwhile, there are no descriptors."""
        self._has_descriptors = False
        try:
            yield
        finally:
            self._has_descriptors = True

    def recover(self) -> Recovery:
        self._pass(StalledWork.RECOVER, "")
        return self.backend.recover()

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        self._pass(StalledWork.CREATE, request.allocation_id)
        response = self.backend.create_namespaces(request)
        self._pass(StalledWork.REPORT, request.allocation_id)
        return response

    def release_namespaces(self, allocation_id: str) -> None:
        self._pass(StalledWork.RELEASE, allocation_id)
        self.backend.release_namespaces(allocation_id)

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        if not self._has_descriptors:
            raise FdPassing("no descriptor is left")
        return self.backend.bundle_of(allocation_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def _pass(self, work: StalledWork, name: str) -> None:
        with self._changed:
            self._waiting.append((work, name))
            self._changed.notify_all()
            passed = self._changed.wait_for(lambda: not self.is_held(work, name), DEADLINE_S)
            self._waiting.remove((work, name))
        assert passed, f"{work} was held up for ever"
