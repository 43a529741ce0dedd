"""`Consumer`: the blocking consumer of `transport.request` with this node's defaults.

By default the Linux kernel says what a descriptor is, and this process makes the namespaces itself
when it cannot reach the provider. Each can be replaced.
"""

from __future__ import annotations

import os
from types import EllipsisType

from statemachine.messages import HANDOFF_SOCKET_PATH
from transport import request
from transport.contract import SelfService
from transport.descriptors import Inspector
from transport.request import Audit, Patience

from .features import Features
from .namespaces import KernelInspector
from .self_service import OwnNamespaces


class Consumer(request.Consumer):
    """
    A blocking consumer that needs no argument; as `transport.request.Consumer`.

        with Consumer() as consumer, consumer.obtain(request) as handoff:
            ...

    Args:
        path: the provider's socket.
        inspector: says what a descriptor really is; None asks the Linux kernel.
        service: makes namespaces when the provider cannot be reached. None never does; by default
            they are made here, and end when the consumer is closed, or when neither it nor a
            handoff of them is left.
        patience: how long to wait.
        audit: called with every `Fallback` to self-service.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = HANDOFF_SOCKET_PATH,
        inspector: Inspector | None = None,
        *,
        service: SelfService | EllipsisType | None = ...,
        patience: Patience | None = None,
        audit: Audit | None = None,
    ) -> None:
        inspector, chosen, self._own = node_defaults(inspector, service)
        super().__init__(path, inspector, service=chosen, patience=patience, audit=audit)

    def close(self) -> None:
        """Close every handoff that was not taken, and end what this consumer made itself."""
        super().close()
        if self._own is not None:
            self._own.close()


def node_defaults(
    inspector: Inspector | None, service: SelfService | EllipsisType | None
) -> tuple[Inspector, SelfService | None, OwnNamespaces | None]:
    """
    Choose what a consumer on this node uses where its caller has not chosen.

    Returns:
        The inspector, the self-service, and that again if it was made here: then the consumer owns
        it.
    """
    features = Features.probe()
    own = OwnNamespaces(features) if service is ... else None
    chosen = own if isinstance(service, EllipsisType) else service
    return inspector or KernelInspector(features), chosen, own
