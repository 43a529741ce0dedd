"""The machine of `transitions` that moves the models of a table."""

from __future__ import annotations

from typing import Any

from transitions import Event, Machine

from .effects import Order


class RowEvent(Event):
    """
    An event of `transitions` that can also be taken without looking for callbacks.

    No row has a callback, because one that raised would leave a move half done. So `take` finds the
    transition of the model's state, sets the state, and returns what the row asks for. Leaving out
    what `trigger` does for callbacks, conditions and queues makes a move ten times as fast, which
    is what an exhaustive search of the kernels is made of. `test_table` moves models by both.
    """

    def take(self, model: Any) -> tuple[Order, ...]:
        """Move a model; raise `MachineError`, as `trigger` does, if it has no such transition."""
        found: Any = self.transitions.get(model.state.name)
        if found is None:
            self._is_valid_source(self.machine.get_model_state(model))
        transition = found[0]
        model.state = self.machine.states[transition.dest].value
        orders: tuple[Order, ...] = transition.effects
        return orders


class TableMachine(Machine):
    """The machine of a table. It has no models of its own, and no queue that all would share."""

    event_cls = RowEvent
    """What its triggers are."""
