"""Self-service of a consumer: a `LinuxBackend` of its own, made when it is first needed."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from statemachine.errors import CreationFailed
from statemachine.messages import NamespaceRequest, NamespaceResponse
from transport.calls import syscall
from transport.descriptors import DescriptorBundle

from .features import Features

if TYPE_CHECKING:
    from .backend import LinuxBackend

DIRECTORY_MODE: Final = 0o755
"""Permissions of a directory that is made because it is missing."""

_log: Final = logging.getLogger(__name__)


class OwnNamespaces:
    """
    Namespaces that a consumer makes itself, and that end with it: a `SelfService`.

    Nothing is imported, looked up or started before the first request, which a consumer makes when
    it cannot reach the provider. `close` ends what was made; so does the end of the program, and
    the loss of the last reference, of which each handoff of such namespaces holds one.

    Args:
        features: what the Linux kernel can do.
        image_root: where images are looked for; None: where `NodeSettings` says.
        uenv_base: where they are mounted; likewise. Made if it is missing and a request has an
            image.
    """

    def __init__(
        self, features: Features, image_root: Path | None = None, uenv_base: Path | None = None
    ) -> None:
        self._features: Final = features
        self._image_root: Final = image_root
        self._uenv_base: Final = uenv_base
        self._guard: Final = threading.Lock()
        self._made: Final[list[LinuxBackend]] = []
        self._end: Final = partial(_end, self._made, os.getpid())
        weakref.finalize(self, self._end)

    @property
    def is_begun(self) -> bool:
        """Whether any were requested."""
        return bool(self._made)

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        As `LinuxBackend.create_namespaces`.

        Raises:
            CreationFailed: likewise, or the directory for images cannot be made.
        """
        backend = self._backend()
        if request.uenv_image is not None:
            base = backend.settings.uenv_base
            try:
                make_directory(base)
            except OSError as error:
                raise CreationFailed(f"make {base}: {error.strerror}") from error
        return backend.create_namespaces(request)

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """As `LinuxBackend.bundle_of`; the caller owns the bundle."""
        return self._backend().bundle_of(allocation_id)

    def scope_of(self, allocation_id: str) -> Path | None:
        """As `LinuxBackend.scope_of`."""
        return self._backend().scope_of(allocation_id)

    def release_namespaces(self, allocation_id: str) -> None:
        """As `LinuxBackend.release_namespaces`."""
        self._backend().release_namespaces(allocation_id)

    def why_alive(self, allocation_id: str) -> str | None:
        """As `LinuxBackend.why_alive`."""
        return self._backend().why_alive(allocation_id)

    def close(self) -> None:
        """End what was made, if anything was; may be called again."""
        self._end()

    def _backend(self) -> LinuxBackend:
        from .backend import IMAGE_ROOT, UENV_BASE, LinuxBackend, NodeSettings

        # Two allocations may be served at once, each in a thread.
        with self._guard:
            if not self._made:
                image_root, uenv_base = self._image_root or IMAGE_ROOT, self._uenv_base or UENV_BASE
                settings = NodeSettings(_cgroup2_if_any(), image_root, uenv_base)
                backend = LinuxBackend.for_self_service(
                    settings, clock=time.monotonic, features=self._features
                )
                self._made.append(backend)
            return self._made[0]


def _cgroup2_if_any() -> Path | None:
    from .cgroups import CgroupUnavailable, find_cgroup2

    try:
        return find_cgroup2()
    except CgroupUnavailable as error:
        _log.warning("%s; there will be no cgroup for the processes", error)
        return None


def _end(made: list[LinuxBackend], pid: int) -> None:
    # A process that was forked from the consumer has copies of all this, and owns none of it.
    if os.getpid() == pid:
        while made:
            made.pop().close()


def make_directory(path: Path) -> None:
    """
    Make a directory, and those it is in, with `DIRECTORY_MODE`; nothing happens if it is there.

    Raises:
        OSError: it is not there and cannot be made.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    syscall(path.mkdir, exist_ok=True)
    syscall(path.chmod, DIRECTORY_MODE)  # mkdir let the umask take bits away
