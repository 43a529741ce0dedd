"""The conformance suite, over our own daemon as a program: once on this node, once simulated."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from linux.features import Features
from linux.namespaces import KernelInspector
from linux.simulated import SimulatedInspector
from linux.testing.conformance import *  # noqa: F403
from linux.testing.wire import ProviderUnderTest
from tests.support.programs import warm_daemon_in

KINDS = [pytest.param("linux", marks=pytest.mark.needs_root), "simulated"]


@pytest.fixture(scope="module", params=KINDS)
def provider(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, image_root: Path
) -> Iterator[ProviderUnderTest]:
    directory = tmp_path_factory.mktemp("provider")
    is_simulated = request.param == "simulated"
    inspector = SimulatedInspector() if is_simulated else KernelInspector(Features.probe())
    with warm_daemon_in(directory, image_root, "--backend", request.param) as daemon:
        yield ProviderUnderTest(daemon.socket, inspector, "hello.sqfs")
