"""Rates of the tables and the kernel, against stock `transitions` in the same run.

`python bench/kernel.py`, without privileges. One life of an allocation is six rows: it is moved by
`Table.fire`, by a stock `transitions.Machine` of the same table, and as events by `ProviderKernel`,
which moves a message and the service besides. Processor time, the best of some runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from statemachine import NamespaceRequest, NamespaceResponse, NamespaceType, ProviderKernel
from statemachine import events as on
from statemachine.lifecycle import ALLOCATION

LIVES, RUNS = 2_000, 5
TYPES = (NamespaceType.PID, NamespaceType.NET)
LIFE = (
    on.RequestAdmitted,
    on.NamespacesCreated,
    on.ResponseSent,
    on.ScopePopulated,
    on.ScopeEmptied,
    on.NamespacesReleased,
)


class BenchModel:
    subject = "a model"
    state = ALLOCATION.initial


def by_table() -> None:
    for _ in range(LIVES):
        model = BenchModel()
        for event in LIFE:
            ALLOCATION.fire(model, event)


def by_stock_machine() -> None:
    model = BenchModel()
    machine = ALLOCATION.machine(model=model)
    triggers = [machine.events[event.__name__] for event in LIFE]
    for _ in range(LIVES):
        machine.set_state(ALLOCATION.initial, model)
        for event in triggers:
            event.trigger(model)


def by_kernel() -> None:
    kernel = ProviderKernel()
    kernel.receive(on.ProviderReady())
    kernel.receive(on.ConnectionOpened(1, 0))
    for number in range(LIVES):
        name = f"a{number}"
        kernel.receive(on.RequestReceived(1, NamespaceRequest(name, TYPES)))
        kernel.receive(on.NamespacesCreated(name, NamespaceResponse(name, TYPES)))
        kernel.receive(on.ResponseSent(name, 1))
        kernel.receive(on.ScopePopulated(name))
        kernel.receive(on.ScopeEmptied(name))
        kernel.receive(on.NamespacesReleased(name))


def seconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    stock = seconds(by_stock_machine)
    for name, work in (("stock", by_stock_machine), ("table", by_table), ("kernel", by_kernel)):
        taken = seconds(work)
        rate = LIVES * len(LIFE) / taken
        print(f"{name:8} {rate:10,.0f} events/s   {stock / taken:5.2f} x stock transitions")


if __name__ == "__main__":
    main()
