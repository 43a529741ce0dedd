"""The two traits of the seed: its names, its parameters, its results."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest

from linux.simulated import SimulatedBackend
from statemachine.messages import NamespaceRequest, NamespaceResponse
from statemachine.roles import NamespaceConsumer, NamespaceProvider
from transport.request import Consumer


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (
            NamespaceProvider.create_namespaces,
            {"request": NamespaceRequest, "return": NamespaceResponse},
        ),
        (NamespaceProvider.release_namespaces, {"allocation_id": str, "return": type(None)}),
        (
            NamespaceConsumer.request_namespaces,
            {"request": NamespaceRequest, "return": NamespaceResponse},
        ),
    ],
)
def test_basic_a_role_asks_what_the_seed_asks(method: object, parameters: dict[str, type]) -> None:
    assert get_type_hints(method) == parameters


@pytest.mark.parametrize(
    ("role", "methods"),
    [
        (NamespaceProvider, {"create_namespaces", "release_namespaces"}),
        (NamespaceConsumer, {"request_namespaces"}),
    ],
)
def test_a_role_has_the_methods_of_the_seed_and_no_other(role: type, methods: set[str]) -> None:
    functions = inspect.getmembers(role, inspect.isfunction)
    assert {name for name, _ in functions if not name.startswith("_")} == methods


def test_what_has_the_methods_plays_the_role() -> None:
    class Both:
        def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
            return NamespaceResponse(request.allocation_id, request.namespaces)

        def release_namespaces(self, allocation_id: str) -> None: ...

        def request_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
            return self.create_namespaces(request)

    assert isinstance(Both(), NamespaceProvider)
    assert isinstance(Both(), NamespaceConsumer)
    assert not isinstance(object(), NamespaceProvider)
    assert not isinstance(object(), NamespaceConsumer)


def test_our_provider_and_our_consumer_play_their_roles() -> None:
    assert issubclass(SimulatedBackend, NamespaceProvider)
    assert not issubclass(SimulatedBackend, NamespaceConsumer)
    assert issubclass(Consumer, NamespaceConsumer)
    assert not issubclass(Consumer, NamespaceProvider)
