"""The command `nshandoff`: `command` has its verbs, and a module each what they do.

command    which verbs there are, what they take, what they exit with
exits      exit codes, and failures that end in one
consumer   what the verbs that are consumers share
serve run request list trace verify
"""

from __future__ import annotations

from .command import main

__all__ = ["main"]
