"""`python -m linux`: the command `nshandoff`, without an installation."""

from __future__ import annotations

from .cli.command import main

if __name__ == "__main__":
    raise SystemExit(main())
