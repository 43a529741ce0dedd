"""What `nshandoff trace check --by model` executes: a trace, held to the reference model."""

from __future__ import annotations

from collections.abc import Sequence

from transport.testing.model_judge import ModelJudge
from transport.trace.check import KernelJudge

from ..cli.exits import Failure, print_error
from ..cli.trace import check_by


def main(words: Sequence[str]) -> int:
    """
    Check a trace.

    Args:
        words: `model` or `both`, and the file.
    """
    by, file = words
    try:
        codes = [check_by(file, KernelJudge)] if by == "both" else []
        codes.append(check_by(file, ModelJudge, " by the model"))
    except Failure as failure:
        print_error(str(failure))
        return failure.code
    return max(codes)
