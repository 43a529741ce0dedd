"""Allocations of a provider: the messages put to them, and what their rows ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .. import effects as do
from .. import events as on
from ..effects import Order
from ..errors import AllocationNotFound, CreationFailed
from ..events import ConnectionId, Event
from ..messages import NamespaceRequest, objection
from ..states import AllocationState, MessageState
from .answers import flush, refuse
from .limits import over
from .models import Allocation, Message
from .state import Handler, State

_OVERTAKEN: Final = "the allocation ended before it could be handed over"


def dispatch(state: State, _: object, message: Message) -> None:
    """Dispatch a message to the allocation it is about, under the name of what it means there."""
    state.fire_message(message, on.MessageDispatched)
    if isinstance(message.question, NamespaceRequest):
        _dispatch_request(state, message, message.question)
    elif message.question is not None:
        _dispatch_end(state, message, message.question.allocation_id)
    flush(state, message.connection)


def _dispatch_request(state: State, message: Message, request: NamespaceRequest) -> None:
    allocation = state.allocations.get(request.allocation_id)
    error = _objection_to_request(state, message.connection, request, allocation)
    if error is not None:
        refuse(state, message, error)
        return
    if allocation is None:
        uid = state.connections[message.connection].uid
        allocation = Allocation(request.allocation_id, request, uid=uid)
        state.enter(allocation)
    state.add_party(allocation, message.connection)
    state.fire_allocation(allocation, _name_of_request(allocation, request), message)


def _objection_to_request(
    state: State, number: ConnectionId, request: NamespaceRequest, allocation: Allocation | None
) -> CreationFailed | None:
    # Keeps ERR-1, ERR-4, PEER-3.
    reason = objection(request)
    if reason is not None:
        return CreationFailed(reason)
    most = state.limits.allocations_per_uid
    usage = state.usage[state.connections[number].uid]
    if allocation is None and usage.allocations >= most:
        return over("live allocations of one user", most)
    return None


def _dispatch_end(state: State, message: Message, name: str) -> None:
    allocation = state.find(name)
    state.add_party(allocation, message.connection)
    is_over = allocation.is_announced or allocation.state is AllocationState.RELEASED
    event = on.EndRepeated if is_over else on.EndReceived
    state.fire_allocation(allocation, event, message)


def _create(state: State, allocation: Allocation, _: object) -> None:
    assert allocation.request is not None
    allocation.is_being_made = True
    state.effects.append(do.CreateNamespaces(allocation.request))


def _watch(state: State, allocation: Allocation, _: object) -> None:
    state.effects.append(do.Watch(allocation.allocation_id))


def _record_handoff(state: State, allocation: Allocation, _: object) -> None:
    state.effects.append(do.RecordHandoff(allocation.allocation_id))


def _release(state: State, allocation: Allocation, _: object) -> None:
    state.effects.append(do.ReleaseNamespaces(allocation.allocation_id))


def _add_asker(state: State, allocation: Allocation, message: Message) -> None:
    allocation.asked.add(message.connection)


def _grant_askers(state: State, allocation: Allocation, _: object) -> None:
    # Keeps LIFE-3, LIFE-4.
    for number in sorted(allocation.asked):
        for message in state.requests(number, allocation, MessageState.OPEN):
            state.fire_message(message, on.MessageGranted)
        flush(state, number)


def _withdraw_grants(state: State, allocation: Allocation, _: object) -> None:
    for number in allocation.asked:
        for message in state.requests(number, allocation, MessageState.GRANTED):
            state.fire_message(message, on.GrantWithdrawn)


def check_claim(state: State, allocation: Allocation, _: object = None) -> None:
    """Name an allocation `Unclaimed` if it is not used and no connection asks for it."""
    # Keeps END-3.
    if not allocation.asked and not allocation.is_populated:
        state.fire_allocation(allocation, on.Unclaimed)


def _defer(state: State, allocation: Allocation, message: Message) -> None:
    state.fire_message(message, on.MessageDeferred)
    allocation.deferred.append(message.connection)


def _withdraw_deferred(state: State, allocation: Allocation, message: Message) -> None:
    # Keeps END-17.
    for early in state.requests(message.connection, allocation, MessageState.DEFERRED):
        refuse(state, early, CreationFailed(_OVERTAKEN))
    allocation.withdraw(message.connection)


def _refuse_conflict(state: State, allocation: Allocation, message: Message) -> None:
    reason = f"allocation {allocation.allocation_id} is alive with another request"
    refuse(state, message, CreationFailed(reason))


def _refuse_draining(state: State, allocation: Allocation, message: Message) -> None:
    refuse(state, message, CreationFailed(_draining(allocation)))


def _refuse_unknown(state: State, allocation: Allocation, message: Message) -> None:
    refuse(state, message, AllocationNotFound(allocation.allocation_id))


def _confirm_end(state: State, allocation: Allocation, message: Message) -> None:
    state.fire_message(message, on.EndConfirmed)


def _answer_end(state: State, allocation: Allocation, _: object) -> None:
    # Keeps END-13.
    for number in allocation.parties:
        for message in state.ends(number, allocation):
            state.fire_message(message, on.EndConfirmed)
            allocation.holders.discard(number)


def _push_end(state: State, allocation: Allocation, _: object) -> None:
    # Keeps END-12.
    for number in sorted(allocation.parties | allocation.holders):
        if number in allocation.holders and not state.connections[number].is_closing:
            state.effects.append(do.AnnounceEnd(number, allocation.allocation_id))
        flush(state, number)
    allocation.holders.clear()
    allocation.is_announced = True


def _fail_askers(state: State, allocation: Allocation, _: object) -> None:
    _fail(state, allocation, {MessageState.OPEN: allocation.failure or _OVERTAKEN})


def _fail_all_askers(state: State, allocation: Allocation, _: object) -> None:
    opened = allocation.failure or _OVERTAKEN
    reasons = {MessageState.OPEN: opened, MessageState.DEFERRED: _draining(allocation)}
    _fail(state, allocation, reasons)


def _fail(state: State, allocation: Allocation, reasons: dict[MessageState, str]) -> None:
    for number in sorted(allocation.parties):
        for message in state.requests(number, allocation, *reasons):
            refuse(state, message, CreationFailed(reasons[message.state]))
        flush(state, number)


def _forget(state: State, allocation: Allocation, _: object) -> None:
    # Keeps LIFE-6.
    state.leave(allocation)
    for number in allocation.deferred:
        if number in state.connections:
            for message in state.requests(number, allocation, MessageState.DEFERRED)[:1]:
                dispatch(state, allocation, message)


def _name_of_request(allocation: Allocation, request: NamespaceRequest) -> type[Event]:
    if allocation.state is AllocationState.UNKNOWN:
        return on.RequestAdmitted
    if allocation.state is AllocationState.ENDED:
        return on.RequestDuringDrain if allocation.is_announced else on.RequestEarly
    return on.RequestRepeated if request == allocation.request else on.RequestConflicting


def _draining(allocation: Allocation) -> str:
    why = allocation.drain or "its release takes long"
    return f"the allocation before it has ended but is not released: {why}"


ORDERS: Final[Mapping[Order, Handler]] = {
    do.DispatchMessage: dispatch,
    do.CreateNamespaces: _create,
    do.Watch: _watch,
    do.RecordHandoff: _record_handoff,
    do.ReleaseNamespaces: _release,
    do.AddAsker: _add_asker,
    do.GrantAskers: _grant_askers,
    do.WithdrawGrants: _withdraw_grants,
    do.CheckClaim: check_claim,
    do.DeferRequest: _defer,
    do.WithdrawDeferred: _withdraw_deferred,
    do.RefuseConflict: _refuse_conflict,
    do.RefuseDraining: _refuse_draining,
    do.RefuseUnknown: _refuse_unknown,
    do.ConfirmEnd: _confirm_end,
    do.AnswerEnd: _answer_end,
    do.PushEnd: _push_end,
    do.FailAskers: _fail_askers,
    do.FailAllAskers: _fail_all_askers,
    do.Forget: _forget,
}
"""What carries out the orders of `ALLOCATION`: for an allocation, because of a message, if any."""
