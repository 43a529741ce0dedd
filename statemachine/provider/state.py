"""The whole state of a provider's kernel, and how its tables are run.

The modules of this package (`service`, `answers`, `allocations`) are functions over a `State`; each
names the orders of the rows that it carries out. `ProviderKernel.orders` puts them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from .. import effects as do
from ..effects import Effect, Order, Timer, Timing
from ..events import ConnectionId, Event
from ..lifecycle import ALLOCATION, MESSAGE, SERVICE
from ..snapshots import HeldMessage, ProviderSnapshot
from ..states import AllocationState, MessageState
from ..table import Table, refusal
from .limits import Limits, Usage
from .models import Allocation, Connection, Message, Service

Handler: TypeAlias = Callable[["State", Any, Any], None]
"""Carries out an order: for this model, because of this message or event."""


class State:
    """
    What a provider knows, and what it has decided in the step that is under way.

    Args:
        limits: who may use the provider, and how much of it.
        orders: what carries out each order of a row.
    """

    def __init__(self, limits: Limits, orders: Mapping[Order, Handler]) -> None:
        self.limits = limits
        self.service = Service()
        self.connections: dict[ConnectionId, Connection] = {}
        self.allocations: dict[str, Allocation] = {}
        self.remembered: dict[str, None] = {}
        """Names of released allocations, the oldest first."""
        self.usage: defaultdict[int, Usage] = defaultdict(Usage)
        """Derived from the above, so in no snapshot."""
        self.effects: list[Effect] = []
        self._orders = orders

    # --- Tables ----------------------------------------------------------------------------------

    def fire_service(self, event: type[Event], cause: Any = None) -> None:
        """Move the provider as a whole."""
        self._fire(SERVICE, self.service, event, cause)

    def fire_message(self, message: Message, event: type[Event]) -> None:
        """Move a message."""
        self._fire(MESSAGE, message, event, message)

    def fire_allocation(
        self, allocation: Allocation, event: type[Event], cause: Any = None
    ) -> None:
        """Move an allocation."""
        self._fire(ALLOCATION, allocation, event, cause)

    def _fire(self, table: Table, model: Any, event: type[Event], cause: Any) -> None:
        for order in table.fire(model, event):
            if isinstance(order, Timing):
                self.time(model, order)
            else:
                self._orders[order](self, model, cause)

    def check_service(self, event: type[Event]) -> None:
        """
        Check that the event has a row for the provider as it stands.

        Raises:
            ProtocolError: it has none; nothing has changed.
        """
        if SERVICE.row(event, self.service.state) is None:
            raise refusal(event, self.service)

    def check_allocation(self, allocation: Allocation, event: type[Event]) -> None:
        """
        Check that the event has a row for the allocation as it stands.

        Raises:
            ProtocolError: it has none; nothing has changed.
        """
        if ALLOCATION.row(event, allocation.state) is None:
            raise refusal(event, allocation)

    def time(self, model: Service | Allocation, order: Timing) -> None:
        """Start or stop a timer of a model; one that does not run is not stopped."""
        if order.starts:
            model.timers.add(order.timer)
            self.effects.append(do.StartTimer(order.timer, model.allocation_id))
        elif order.timer in model.timers:
            model.timers.discard(order.timer)
            self.effects.append(do.StopTimer(order.timer, model.allocation_id))

    # --- What is there ---------------------------------------------------------------------------

    def find(self, allocation_id: str) -> Allocation:
        """Find an allocation, or make one that stands for a name: released, or unknown."""
        allocation = self.allocations.get(allocation_id)
        if allocation is not None:
            return allocation
        is_over = allocation_id in self.remembered
        state = AllocationState.RELEASED if is_over else AllocationState.UNKNOWN
        return Allocation(allocation_id, state=state)

    def enter(self, allocation: Allocation) -> None:
        """Take an allocation up among those that are not released."""
        self.allocations[allocation.allocation_id] = allocation
        self._count(allocation, +1)
        self.remembered.pop(allocation.allocation_id, None)

    def leave(self, allocation: Allocation) -> None:
        """Keep nothing of an allocation but its name."""
        del self.allocations[allocation.allocation_id]
        self._count(allocation, -1)
        for number in allocation.parties:
            self.connections[number].concerns.discard(allocation.allocation_id)
        self.remembered.pop(allocation.allocation_id, None)
        self.remember([allocation.allocation_id])

    def remember(self, names: Iterable[str]) -> None:
        """Remember names of released allocations, and forget the oldest beyond the limit."""
        # Keeps END-18, CRASH-6.
        self.remembered |= dict.fromkeys(names)
        while len(self.remembered) > self.limits.remembered:
            del self.remembered[next(iter(self.remembered))]

    def add_party(self, allocation: Allocation, number: ConnectionId) -> None:
        """Note that a connection has sent a message about an allocation."""
        # An allocation that only stands for a name is not kept, and is no concern of anyone.
        allocation.parties.add(number)
        if allocation.allocation_id in self.allocations:
            self.connections[number].concerns.add(allocation.allocation_id)

    def requests(
        self, connection: ConnectionId, allocation: Allocation, *states: MessageState
    ) -> list[Message]:
        """List a connection's requests for an allocation that are in one of the states."""
        name = allocation.allocation_id
        messages = self.connections[connection].messages
        return [m for m in messages if m.state in states and m.is_request_for(name)]

    def ends(self, connection: ConnectionId, allocation: Allocation) -> list[Message]:
        """List a connection's ends of an allocation that are open."""
        name = allocation.allocation_id
        messages = self.connections[connection].messages
        return [m for m in messages if m.state is MessageState.OPEN and m.is_end_of(name)]

    def _count(self, allocation: Allocation, change: int) -> None:
        if allocation.uid is not None:
            self.usage[allocation.uid].allocations += change

    # --- As values -------------------------------------------------------------------------------

    def freeze(self) -> ProviderSnapshot:
        """Take everything but the limits as values."""
        connections = self.connections
        return ProviderSnapshot(
            self.service.state,
            tuple(x.freeze(c) for c, x in sorted(connections.items())),
            tuple(a.freeze() for _, a in sorted(self.allocations.items())),
            tuple(
                HeldMessage(m.connection, connections[m.connection].messages.index(m))
                for m in self.service.held
            ),
            tuple(self.remembered),
        )

    def thaw(self, snapshot: ProviderSnapshot) -> None:
        """Become what `freeze` took; of a state that is new."""
        self.service.state, connections, allocations, held, remembered = snapshot
        self.remember(remembered)
        for of_one in connections:
            self.connections[of_one.number] = connection = Connection.thaw(of_one)
            self.usage[connection.uid].connections += 1
            self.usage[connection.uid].messages += len(connection.messages)
        for frozen in allocations:
            allocation = Allocation.thaw(frozen)
            self.allocations[allocation.allocation_id] = allocation
            self._count(allocation, +1)
            for number in allocation.parties | allocation.holders:
                self.connections[number].concerns.add(allocation.allocation_id)
        for number, place in held:
            self.service.held.append(self.connections[number].messages[place])
        if held:
            self.service.timers.add(Timer.READINESS)
