"""Replace a file in one step: a reader finds the old content or the new one, never half of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from transport.calls import syscall

from .syscalls import calling


def replace_file(path: Path, text: str, mode: int | None = None) -> os.stat_result:
    """
    Write a file beside its place, and rename it to there.

    Args:
        path: Where it has to be.
        text: Its content.
        mode: Its permissions; None has the umask say.

    Returns:
        Its status, to know it again by (`os.path.samestat`).

    Raises:
        SyscallError: what was there before is unchanged, and nothing else is left.

    Source:
        rename(2).
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with calling("write(2)", path):
            syscall(draft.write_text, text, encoding="utf-8")
            if mode is not None:
                syscall(draft.chmod, mode)
            status = syscall(draft.stat)
        with calling("rename(2)", path):
            syscall(draft.replace, path)
    except OSError:
        with suppress(OSError):
            syscall(draft.unlink)
        raise
    return status
