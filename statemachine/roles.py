"""The seed's two traits as protocols: provider and consumer of namespaces.

Names, parameters and results are the seed's. Descriptors do not appear: they travel beside the
response, and each side offers them through its own package (`transport.descriptors`).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from .messages import NamespaceRequest, NamespaceResponse


@runtime_checkable
class NamespaceProvider(Protocol):
    """
    Makes and releases the namespaces of allocations (pact-agent's role).

    Source: seed 65-88.
    """

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        Create what the request asks for.

        Returns:
            The metadata; `fd_types` equals the request's `namespaces`.

        Raises:
            CreationFailed: a step failed. Every step before it is undone.
        """
        ...

    def release_namespaces(self, allocation_id: str) -> None:
        """
        Release everything an allocation has: processes, mounts, cgroup, descriptors.

        Raises:
            AllocationNotFound: no such allocation; nothing changed.
        """
        ...


@runtime_checkable
class NamespaceConsumer(Protocol):
    """
    Obtains namespaces for allocations (lattice-node-agent's role).

    Source: seed 90-104.
    """

    def request_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        Obtain namespaces from the provider, or by self-service where it cannot be reached.

        Raises:
            CreationFailed: the provider refused, or self-service failed too.
            AllocationNotFound: the provider does not know the allocation.
        """
        ...
