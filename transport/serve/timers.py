"""Timers of a provider: how long each runs, and running them on the event loop's clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Timer
from statemachine.events import ProviderInput
from statemachine.record import record

READINESS_TIMEOUT_S: Final = 30.0
"""Longest wait of a message for the provider to be ready."""

CLAIM_TIMEOUT_S: Final = 300.0
"""How long an allocation lives that is not used, and whose consumer is gone."""

RELEASE_DEADLINE_S: Final = 2.0
"""How long an end stays unannounced while the release is not complete."""

PARTIAL_FRAME_TIMEOUT_S: Final = 5.0
"""Longest time from the first byte of a frame to its last."""

LINGER_TIMEOUT_S: Final = 1.0
"""How long a connection that is being closed may take to read what was sent to it."""

UNREAD_TIMEOUT_S: Final = 30.0
"""How long answers may wait for a peer to read what was sent before; then nothing more is sent."""

IMAGE_TIMEOUT_S: Final = 20.0
"""How long a creation with an image may take: less than a consumer waits for its answer."""

RETRY_FIRST_S: Final = 0.001
"""Pause before the second try to release; it doubles with each further try."""

RETRY_MAX_S: Final = 1.0
"""Longest pause between two tries to release."""

BACKEND_PAUSE_S: Final = 1.0
"""Pause before a backend is asked again that failed where none may fail."""


@record
class Spans:
    """How long the provider's timers run, in seconds. The defaults are the constants above."""

    readiness_s: float = READINESS_TIMEOUT_S
    """The wait of a message for the provider to be ready."""
    claim_s: float = CLAIM_TIMEOUT_S
    """The life of what is neither used nor waited for."""
    release_s: float = RELEASE_DEADLINE_S
    """From an end to its announcement, at most."""
    partial_frame_s: float = PARTIAL_FRAME_TIMEOUT_S
    """From a frame's first byte to its last, at most."""
    linger_s: float = LINGER_TIMEOUT_S
    """For a peer to read what was sent before its connection is closed."""
    empty_grace_s: float = 0.0
    """How long a used cgroup must stay empty to count as ended."""
    unread_s: float = UNREAD_TIMEOUT_S
    """For a peer to read what keeps answers waiting."""
    image_s: float = IMAGE_TIMEOUT_S
    """For a creation with an image, from its turn in the kernel on."""


class Timers:
    """
    The timers that the provider's kernel starts.

    Args:
        spans: how long they run.
        feed: takes the event when one expires.
    """

    def __init__(self, spans: Spans, feed: Callable[[ProviderInput], None]) -> None:
        self._spans: Final = spans
        self._feed: Final = feed
        self._running: Final[dict[tuple[Timer, str], asyncio.TimerHandle]] = {}
        self._tries: Final[dict[str, int]] = {}
        """How often each release has been tried."""

    def start(self, effect: do.StartTimer) -> None:
        """Start a timer, or start it anew."""
        self.stop(effect)
        key = (effect.timer, effect.allocation_id)
        span_s = self._span_of(*key)
        self._running[key] = asyncio.get_running_loop().call_later(span_s, self.expire, *key)

    def stop(self, effect: do.StartTimer | do.StopTimer) -> None:
        """Stop a timer, if it runs."""
        handle = self._running.pop((effect.timer, effect.allocation_id), None)
        if handle is not None:
            handle.cancel()

    def expire(self, timer: Timer, name: str) -> None:
        """
        Let a timer run out.

        Raises:
            KeyError: it does not run.
        """
        self._running.pop((timer, name)).cancel()
        self._feed(on.ReadinessOverdue() if timer is Timer.READINESS else _EXPIRIES[timer](name))

    def forget(self, name: str) -> None:
        """Begin the pauses between tries anew for the next allocation of a name."""
        self._tries.pop(name, None)

    def close(self) -> None:
        """Stop all of them."""
        for handle in self._running.values():
            handle.cancel()

    def _span_of(self, timer: Timer, name: str) -> float:
        if timer is Timer.RETRY:
            tries = self._tries[name] = self._tries.get(name, -1) + 1
            # Bounded: the power of two of a large number is no float.
            return min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(tries, 30))
        return {
            Timer.READINESS: self._spans.readiness_s,
            Timer.CLAIM: self._spans.claim_s,
            Timer.RELEASE: self._spans.release_s,
        }[timer]


_EXPIRIES: Final[dict[Timer, Callable[[str], ProviderInput]]] = {
    Timer.CLAIM: on.ClaimExpired,
    Timer.RELEASE: on.ReleaseOverdue,
    Timer.RETRY: on.RetryDue,
}
