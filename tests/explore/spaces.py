"""The spaces that are explored, and what each is for.

*The full space of two allocations and two connections, with crashes*, is two of them. Against
consumers: two of them as they are, each of which asks for either allocation and ends it as often as
it likes, over two connections at a time, while the provider may die between any two effects, as
often as it likes, with the backend having begun what it was asked for or not. Against strangers:
two peers who say anything that the provider can be asked, in any order, hang up and call again at
any time, under the same crashes, with one message of each unanswered at a time. No counter bounds
either of them: all that ends is the variety. Where the link loses nothing, the rule that losses
come first is not needed, and not assumed (`has_losses_first`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.provider import Limits
from statemachine.testing.explore import CUT, FAILED_TO_PASS, MISMATCHED, NOT_FOUND, Bounds, only

PID, NET = NamespaceType.PID, NamespaceType.NET
A: Final = NamespaceRequest("a", (NET, PID))
A_TOO: Final = NamespaceRequest("a", (PID,))
A_BAD: Final = NamespaceRequest("a", (PID, PID))
B: Final = NamespaceRequest("b", (NET, PID))

LIES: Final = (CUT, MISMATCHED, NOT_FOUND, FAILED_TO_PASS)
TALK: Final = ("call", "ask", "tell of end")
"""What a stranger can do that any peer may do."""


def strangers(count: int, *acts: str, **bounds: Any) -> Bounds:
    """Bounds without consumers, in which so many strangers do this, and what any peer may do."""
    return Bounds(consumers=0, strangers=count, without=only(*TALK, *acts), **bounds)


@dataclass(frozen=True)
class Space:
    """Bounds, and what is known of the worlds within."""

    bounds: Bounds
    states: int
    """About how many worlds there are: a few less, so that another model may know less."""
    seconds: float
    """About how long it takes on one core."""
    scale: float = 0
    """From which scale on a campaign has time for it."""


SPACES: Final[dict[str, Space]] = {
    "any number of requests and crashes": Space(
        Bounds(requests_each=None, crashes=None, has_losses_first=False), 270_000, 20
    ),
    "a fault of any kind": Space(Bounds(faults=1, spoils=LIES), 88_000, 7),
    "two strangers, two allocations, two connections, crashes": Space(
        strangers(2, "hang up", "crash", requests=(A, B), in_flight=1, crashes=None),
        75_000,
        20,
    ),
    "a stranger, every fault, any number of crashes": Space(
        Bounds(consumers=0, strangers=1, in_flight=1, crashes=None, faults=None), 25_000, 7
    ),
    "a stranger, one fault, any number of crashes": Space(
        Bounds(consumers=0, strangers=1, in_flight=1, crashes=None, faults=1), 10_000, 3
    ),
    "two strangers that send what is unreadable, and crashes": Space(
        strangers(2, "send unreadable", "crash", crashes=None),
        4_000,
        2,
    ),
    "two allocations": Space(Bounds(requests=(A, B)), 6_000, 1),
    "two consumers, one fault": Space(
        Bounds(
            consumers=2,
            faults=1,
            without=only("want", "end", "die", "fail", "init dies", "release"),
        ),
        4_000,
        1,
    ),
    "two consumers, one connection lost": Space(
        Bounds(consumers=2, connections=3, faults=1, without=only("want", "end", "lose")),
        13_000,
        1,
    ),
    "two consumers who want different things": Space(
        Bounds(
            consumers=2, requests=(A, A_TOO), faults=2, without=only("want", "die", "init dies")
        ),
        1_000,
        1,
    ),
    "two consumers who want different things, and a crash": Space(
        Bounds(consumers=2, requests=(A, A_TOO), crashes=1, without=only("want", "crash")),
        11_000,
        1,
    ),
    "a response that is spoiled": Space(
        Bounds(faults=1, spoils=LIES, without=only("want", "end", "spoil")), 150, 1
    ),
    "a request twice": Space(
        Bounds(faults=2, without=only("want", "init dies", "duplicate")), 80, 1
    ),
    "adopted, and asked for and ended before it is ready": Space(
        Bounds(
            requests_each=2,
            crashes=1,
            faults=2,
            without=only("want", "end", "die", "init dies", "crash"),
        ),
        400,
        1,
    ),
    "neither can": Space(
        Bounds(
            faults=2,
            spoils=(MISMATCHED,),
            without=only("want", "end", "overdue", "spoil", "fail self"),
        ),
        1_000,
        1,
    ),
    "two strangers at the provider's limits": Space(
        strangers(
            2,
            requests=(A, B),
            limits=Limits(
                waiting=1,
                open_per_connection=2,
                open_per_uid=3,
                allocations_per_uid=1,
                remembered=1,
            ),
        ),
        23_000,
        5,
    ),
    "a stranger who does not wait for answers, and a crash": Space(
        strangers(1, "crash", "fail", requests=(A, B), in_flight=2, crashes=1, faults=1),
        4_000,
        2,
    ),
    "a stranger who does not wait for answers, any number of crashes": Space(
        strangers(1, "crash", requests=(A, B), in_flight=2, crashes=None),
        3_000,
        1,
    ),
    "a stranger who floods, among few": Space(
        strangers(
            2,
            "send unreadable",
            "crash",
            requests=(A, A_BAD),
            in_flight=3,
            limits=Limits(open_per_connection=1, connections_per_uid=1, remembered=1),
            crashes=1,
        ),
        140,
        1,
    ),
}
"""Those of every campaign; the tests explore those that take the fewest seconds."""

TWO_BY_TWO: Final = Bounds(
    consumers=2,
    requests=(A, B),
    requests_each=None,
    crashes=None,
    without=only("want", "end", "crash"),
    has_losses_first=False,
)
LARGE: Final[dict[str, Space]] = {
    "the full space of two allocations and two connections, with crashes": Space(
        TWO_BY_TWO, 850_000, 75, scale=1
    ),
    "a stranger, two allocations, any number of crashes": Space(
        Bounds(consumers=0, strangers=1, requests=(A, B), in_flight=1, crashes=None, faults=0),
        200_000,
        60,
        scale=2,
    ),
}
"""Those of a campaign besides that has the time."""
