"""Run one life again, as a script of choices says, and tell it step by step."""

from __future__ import annotations

import sys

from tests.suites.virtual.lives import LIVES
from transport.testing.virtual.choices import Scheduler, read


def main(words: list[str]) -> int:
    if not words or words[0] not in LIVES:
        print(f"one of: {', '.join(LIVES)}", file=sys.stderr)
        return 2
    scheduler = Scheduler(read(words[1:]))
    try:
        stage = LIVES[words[0]].run(scheduler)
    except Exception as error:
        print("\n".join(getattr(error, "__notes__", [])))
        print(f"{type(error).__name__}: {error}")
        return 1
    print("\n".join(stage.world.story))
    print(f"{len(scheduler.widths)} choices")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
