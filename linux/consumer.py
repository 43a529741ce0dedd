"""`Consumer`: the blocking consumer of `transport.request` with this node's defaults.

By default the Linux kernel says what a descriptor is, and this process makes the namespaces itself
when it cannot reach the provider. Each can be replaced.
"""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path
from types import EllipsisType
from typing import Final

from statemachine.errors import SocketUnavailable
from statemachine.messages import HANDOFF_SOCKET_PATH
from transport import request
from transport.calls import syscall
from transport.contract import SelfService
from transport.descriptors import Inspector
from transport.endpoint import begin_connect
from transport.request import Audit, Patience
from transport.request.exchange import BaseConsumer, H

from .cgroups import DEFAULT_PLACE, Scope, ScopeError, find_cgroup, find_cgroup2
from .features import Features
from .namespaces import KernelInspector
from .scope_file import read_scope_file
from .self_service import OwnNamespaces

READY_SOCKET_PATH: Final = "/run/pact/ready.sock"
"""Where a provider at the default place tells when it serves requests."""

READY_TIMEOUT_S: Final = 30.0
"""How long to wait for that."""

READY_PAUSE_S: Final = 0.1
"""How long to wait before another look for the socket."""


class NodeConsumer(BaseConsumer[H]):
    """What `Consumer` and `AsyncConsumer` have in common: this node's defaults."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = HANDOFF_SOCKET_PATH,
        inspector: Inspector | None = None,
        *,
        service: SelfService | EllipsisType | None = ...,
        patience: Patience | None = None,
        audit: Audit | None = None,
        keeps: int = 0,
    ) -> None:
        features = Features.probe()
        inspector = inspector or KernelInspector(features)
        self._own: OwnNamespaces | None = None
        """The self-service, if it was made here: then it is closed with the consumer."""
        if isinstance(service, EllipsisType):
            service = self._own = OwnNamespaces(features)
        super().__init__(
            path, inspector, service=service, patience=patience, audit=audit, keeps=keeps
        )


class Consumer(NodeConsumer[request.Handoff], request.Consumer):
    """
    A blocking consumer that needs no argument; as `transport.request.Consumer`.

        with Consumer() as consumer, consumer.obtain(request) as handoff:
            ...

    Args:
        path: the provider's socket; None: the node has no provider, and none is asked.
        inspector: says what a descriptor really is; None asks the Linux kernel.
        service: makes namespaces when the provider cannot be reached. None never does; by default
            they are made here, and end when the consumer is closed, or when neither it nor a
            handoff of them is left.
        patience: how long to wait.
        audit: called with every `Fallback` to self-service.
        keeps: how many connections are kept for later requests, once their allocation is over.
    """

    def close(self) -> None:
        """Close every handoff that was not taken, and end what this consumer made itself."""
        super().close()
        if self._own is not None:
            self._own.close()


def find_scope(socket: str | os.PathLike[str], allocation_id: str) -> Path | None:
    """
    Find the scope that a provider made for an allocation, and verify that it has an owner.

    Args:
        socket: The provider's, from which the allocation was obtained.
        allocation_id: The allocation, which must be alive.

    Returns:
        The cgroup's directory, as it is seen here; None if the provider says that it makes none.

    Raises:
        ScopeError: there is no such scope, or no provider's. Nothing may be put into it.
        CgroupUnavailable: it cannot be seen from here.
        ValueError: the provider says where in a form that cannot be read.
    """
    # Keeps NODE-23.
    said = read_scope_file(Path(socket))
    if said is None:
        root, place = find_cgroup2(), DEFAULT_PLACE
    elif said.cgroup_id is None:
        return None
    else:
        root, place = find_cgroup(said.cgroup_id), said.place
    path = place.path_of(root, allocation_id)
    if Scope(path, "").owner() is None:
        advice = f"the provider at {socket} should have made it, and it has no owner"
        raise ScopeError("getxattr(2)", errno.ENODATA, path, advice)
    return path


def wait_ready(
    path: str | os.PathLike[str] = READY_SOCKET_PATH, timeout_s: float = READY_TIMEOUT_S
) -> None:
    """
    Wait until a provider serves requests; a request would wait as well, but not for its start.

    Args:
        path: The socket that tells, `serve --ready-socket`.
        timeout_s: How long, for the socket and then for the word.

    Raises:
        SocketUnavailable: none does in time.
    """
    reason = SocketUnavailable(f"{path}: the provider is not ready within {timeout_s:g} s")
    for _ in range(max(1, round(timeout_s / READY_PAUSE_S))):
        try:
            with begin_connect(path) as sock:
                sock.settimeout(timeout_s)
                if syscall(sock.recv, 1):
                    return
        except SocketUnavailable as error:
            reason = error
        except BlockingIOError:
            pass
        except OSError as error:
            raise reason from error
        select.poll().poll(READY_PAUSE_S * 1000)
    raise reason
