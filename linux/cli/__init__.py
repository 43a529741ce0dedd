"""The command `nshandoff`.

command    the command line: verbs, options, exit codes
parser     what is said of a command line that makes no sense
exits      exit codes, and the errors that lead to them
consumer   what the verbs that act as a consumer share
serve, run, request, list, trace, verify: a module for each verb
"""

from __future__ import annotations

from .command import main

__all__ = ["main"]
