"""The command line of `nshandoff`: verbs, options and exit codes.

    serve     be this node's provider                     cli.serve
    run       run a command inside an allocation          cli.run
    exec      run a command inside a living allocation    cli.run
    request   obtain namespaces, show them, hold them     cli.request
    end       end an allocation                           cli.request
    list      show allocations, their state and remains   cli.list
    doctor    say what is alive or dead, release the dead cli.doctor
    trace     check or draw what `serve --trace` wrote    cli.trace
    verify    run the campaign that verifies this tree    cli.verify
    demo      two allocations' lives, checked             demo

The module of a verb is imported when the verb is used, because that takes ten times as long as this
module, and `--help` should be quick. For the same reason the defaults are repeated here; a test
compares them with the constants.

EXIT CODES
    0     done
    1     the answer is no: the allocation cannot be created, or is not known; doctor: something
          needs attention
    2     the command line makes no sense; nothing was done
    3     this node, or this user on it, cannot
    4     the provider cannot be reached, and self-service was not allowed
    125   run, exec: nshandoff itself failed, for any reason, wrong usage among them, so that
          none of these is taken for the exit code of the command
    126   run, exec: the command cannot be executed
    127   run, exec: there is no such command
    128+N ended by signal N; 130 is Ctrl-C
    else  run, exec: the exit code of the command; they end by the signal that ended it
"""

from __future__ import annotations

import argparse
import gc
import math
import posixpath
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from .exits import PROGRAM, SIGNAL_BASE, ExitCode, Failure, Interrupted, flush, print_error
from .parser import Parser

Verb: TypeAlias = Callable[[argparse.Namespace], int]
"""Does what the options ask for, and returns the exit code."""

DISTRIBUTION: Final = "namespace-handoff"
"""The name of the distribution on a package index."""

DEFAULT_SCOPE: Final = ("workload.slice", "{id}.scope")
"""Parent and name of the cgroups of allocations; as `linux.cgroups.DEFAULT_PLACE` has them."""

DEFAULT_PATHS: Final = {
    "socket": "/run/pact/handoff.sock",
    "state_dir": "/run/pact/state",
    "image_root": "/var/lib/uenv",
    "uenv_base": "/run/pact/uenv",
}
DEFAULT_SPANS_S: Final = {
    "hold_time": 60.0,
    "claim_timeout": 300.0,
    "release_deadline": 2.0,
    "empty_grace": 0.0,
}
DEFAULT_COUNTS: Final = {"allocations": 4096, "connections": 4096}
DEFAULT_MODE: Final = 0o600

ID_MAX: Final = 2**32 - 2
"""Largest number of a user or group; the one above it means none (chown(2))."""

_ABOUT: Final = "Hand namespaces from an HPC node's provider to its consumers."
_EPILOG: Final = "exit codes:" + (__doc__ or "").partition("EXIT CODES")[2].rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        arguments: Without the program's name; None for this process's own.

    Returns:
        The exit code; the table is in this module's docstring.
    """
    fault = ""
    try:
        code = _perform(list(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as stop:  # help, or a command line that makes no sense
        code = int(stop.code or 0)
    except OSError as error:
        code, fault = ExitCode.ENVIRONMENT, f"{type(error).__name__}: {error}"
    if unwritten := flush(sys.stdout):
        code, fault = code or ExitCode.ENVIRONMENT, f"standard output: {unwritten}"
    if fault:
        print_error(fault)
    flush(sys.stderr)
    return code


def _perform(words: list[str]) -> int:
    options = None if words[:1] == ["demo"] else _parse(words)
    try:
        if options is None:
            return _demo(words[1:])
        perform = _VERBS[options.verb](options)
        _enable_gc()
        return int(perform(options))
    except Failure as failure:
        if options is not None and failure.code is ExitCode.USAGE:
            options.parser.error(str(failure))
        print_error(str(failure))
        return failure.code
    except Interrupted as interruption:
        return SIGNAL_BASE + interruption.number
    except KeyboardInterrupt:
        return SIGNAL_BASE + 2


def _enable_gc() -> None:
    """
    Have garbage collected from now on, if `python -m linux` has put it off until all is imported.

    What is there now stays to the end and is never looked through, which would be a sixth of the
    time that `list` takes.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def build_parser(verb: str = "") -> argparse.ArgumentParser:
    """
    Make the parser of a command line, up to a `--`.

    Args:
        verb: The one that it begins with; the others are then left out. Empty for all.
    """
    parser = Parser(
        prog=PROGRAM,
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, add in _PARSERS.items():
        if verb in (name, "") or verb not in _PARSERS:
            add(verbs)
    return parser


# --- The verbs ---------------------------------------------------------------------------------


def _serve(_: argparse.Namespace) -> Verb:
    from .serve import serve

    return serve


def _run(_: argparse.Namespace) -> Verb:
    from .run import run

    return run


def _exec(_: argparse.Namespace) -> Verb:
    from .run import enter

    return enter


def _request(_: argparse.Namespace) -> Verb:
    from .request import request

    return request


def _end(_: argparse.Namespace) -> Verb:
    from .request import end

    return end


def _list(_: argparse.Namespace) -> Verb:
    from .list import list_allocations

    return list_allocations


def _doctor(_: argparse.Namespace) -> Verb:
    from .doctor import doctor

    return doctor


def _trace(options: argparse.Namespace) -> Verb:
    from . import trace

    return trace.check if options.what == "check" else trace.show


def _verify(_: argparse.Namespace) -> Verb:
    from .verify import verify

    return verify


def _demo(words: list[str]) -> int:
    # It parses its options itself.
    from ..demo.command import main as demo

    _enable_gc()
    return demo(words)


_VERBS: Final[Mapping[str, Callable[[argparse.Namespace], Verb]]] = {
    "serve": _serve,
    "run": _run,
    "exec": _exec,
    "request": _request,
    "end": _end,
    "list": _list,
    "doctor": _doctor,
    "trace": _trace,
    "verify": _verify,
}


# --- Their options -----------------------------------------------------------------------------


def _add_serve(verbs: Any) -> None:
    about = (
        "Be this node's provider, in the foreground: JSON lines on standard error, the file "
        "STATE_DIR/ready and READY=1 to $NOTIFY_SOCKET when requests are served. SIGTERM and "
        "SIGINT stop it, no other signal does; allocations stay alive for the next one to adopt. "
        "Lines of the log, the trace and the audit that cannot be written are lost and counted."
    )
    serve = verbs.add_parser("serve", help="be this node's provider", description=about)
    _add_socket(serve)
    _add_places(serve)
    _add_state_dir(serve)
    _add_span(serve, "hold_time", "how long an unused image stays mounted")
    _add_span(serve, "claim_timeout", "life of an allocation that is not used or claimed")
    _add_span(serve, "release_deadline", "an end is announced by then")
    _add_span(serve, "empty_grace", "how long a used cgroup must stay empty")
    _add_users(serve)
    _add_scopes(serve)
    about = (
        "make N anchors with these namespaces (pid, net, mount; commas between them) before they "
        "are asked for, while nothing else is; repeatable"
    )
    serve.add_argument("--pool", metavar="TYPES=N", action="append", default=[], help=about)
    _add_reports(serve)
    _add_backend(serve)


def _add_users(serve: argparse.ArgumentParser) -> None:
    """Who may connect, and how much of the provider each may use."""
    serve.add_argument(
        "--allow-uid",
        metavar="UID",
        action="append",
        type=_user,
        default=[],
        help="serve this user as well; repeatable (the provider's own always is)",
    )
    for what, count in DEFAULT_COUNTS.items():
        serve.add_argument(
            f"--max-{what}",
            metavar="N",
            type=_count,
            default=count,
            help=f"most {what} of one user (default {count})",
        )
    serve.add_argument(
        "--mode",
        metavar="OCTAL",
        type=_mode,
        default=DEFAULT_MODE,
        help=f"permissions of the socket (default {DEFAULT_MODE:04o})",
    )
    serve.add_argument(
        "--group", metavar="NAME", type=_group, help="group of the socket, by name or number"
    )


def _add_scopes(serve: argparse.ArgumentParser) -> None:
    """Where the cgroups of allocations are, and what they are called."""
    serve.add_argument(
        "--no-scopes",
        action="store_true",
        help="make no cgroups: for a user namespace that has none; nothing ends by emptying",
    )
    parent, name = DEFAULT_SCOPE
    about = f"the cgroup that contains those of allocations (default {parent})"
    serve.add_argument("--scope-parent", metavar="CGROUP", default=parent, help=about)
    about = f"what an allocation's cgroup is called, with {{id}} in it (default {name})"
    serve.add_argument("--scope-name", metavar="PATTERN", default=name, help=about)


def _add_reports(serve: argparse.ArgumentParser) -> None:
    """Where the provider tells that it serves, and what it does."""
    about = "exists while requests are served (default: `ready` beside the socket)"
    serve.add_argument("--ready-file", metavar="FILE", type=_path, help=about)
    about = "tells who connects when requests are served (default: `ready.sock` beside the socket)"
    serve.add_argument("--ready-socket", metavar="PATH", type=_path, help=about)
    about = "append every event and what was decided to this file, for `trace`"
    serve.add_argument("--trace", metavar="FILE", type=_path, help=about)
    about = "append audit events to this file, in the form of upstream's hpc-audit"
    serve.add_argument("--audit", metavar="FILE", type=_path, help=about)


def _add_run(verbs: Any) -> None:
    about = (
        "Run a command in the namespaces and the cgroup of an allocation, and end the allocation "
        "when it exits. Signals are passed on to it, its exit status is passed back."
    )
    usage = f"{PROGRAM} run [--id ID] --namespaces TYPES [--uenv IMAGE] [options] -- COMMAND ..."
    run = verbs.add_parser(
        "run", help="run a command inside an allocation", description=about, usage=usage
    )
    run.failure_code = ExitCode.RUN_FAILED
    run.add_argument("--id", metavar="ID", help="the allocation's id (default: a new one)")
    _add_request_options(run)
    _add_places(run)
    run.add_argument(
        "--tie",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end the allocation also if this command is killed (default); by self-service always",
    )
    run.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER)


def _add_exec(verbs: Any) -> None:
    about = (
        "Run a command in the namespaces and the cgroup of an allocation that is alive, and leave "
        "it alive: for the ranks of a job, or to look around. Otherwise as `run`."
    )
    usage = f"{PROGRAM} exec [--socket PATH] [--state-dir DIR] ID -- COMMAND ..."
    entering = verbs.add_parser(
        "exec", help="run a command inside a living allocation", description=about, usage=usage
    )
    entering.failure_code = ExitCode.RUN_FAILED
    _add_socket(entering)
    _add_state_dir(entering)
    entering.add_argument("id", metavar="ID", help="the allocation's id")
    entering.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER)


def _add_request(verbs: Any) -> None:
    about = (
        "Obtain namespaces, show what was received and verified, and hold the descriptors until "
        "SIGINT, SIGTERM or the allocation's end."
    )
    request = verbs.add_parser(
        "request", help="obtain namespaces, show and hold them", description=about
    )
    request.add_argument("--id", metavar="ID", required=True, help="the allocation's id")
    _add_request_options(request)
    _add_places(request)
    request.add_argument("--json", action="store_true", help="show one JSON object")
    request.add_argument(
        "--end", action="store_true", help="end the allocation afterwards, instead of leaving it"
    )
    _add_backend(request)


def _add_end(verbs: Any) -> None:
    end = verbs.add_parser(
        "end", help="end an allocation", description="End an allocation of any consumer."
    )
    end.add_argument("id", metavar="ID", help="the allocation's id")
    _add_socket(end)


def _add_list(verbs: Any) -> None:
    about = (
        "Show the allocations of a provider, whether it runs or not, from its journal and the "
        "Linux kernel. Changes nothing."
    )
    listing = verbs.add_parser("list", help="show allocations and images", description=about)
    _add_state_dir(listing)
    listing.add_argument("--json", action="store_true", help="show one JSON object")


def _add_doctor(verbs: Any) -> None:
    about = (
        "Say of everything that providers have on this node whether it is ALIVE, DEAD or UNKNOWN, "
        "and why. Exit code 1: something needs attention. Works while the provider is down, and "
        "for what lost state directories have left."
    )
    doctor = verbs.add_parser("doctor", help="say what is alive or dead", description=about)
    _add_state_dir(doctor)
    about = "release what is proved dead and set a damaged journal aside; nothing else is touched"
    doctor.add_argument("--repair", action="store_true", help=about)
    doctor.add_argument("--json", action="store_true", help="show one JSON object")


def _add_trace(verbs: Any) -> None:
    about = "Look at what a provider wrote down that was started with --trace. Needs nothing else."
    trace = verbs.add_parser("trace", help="check or draw a provider's trace", description=about)
    whats = trace.add_subparsers(dest="what", metavar="WHAT", required=True)
    about = (
        "Check the trace against the provider's rules. Exit code 1: prints the first line that "
        "cannot have happened, which clauses it breaks, and what could have."
    )
    check = whats.add_parser("check", help="check that it can have happened", description=about)
    about = (
        "what the trace is held to: this implementation's kernel, effect for effect; the reference "
        "model, which fits any implementation; or both, one after the other (default: kernel)"
    )
    judges = ("kernel", "model", "both")
    check.add_argument("--by", choices=judges, default="kernel", help=about)
    check.add_argument("file", metavar="FILE", type=_path, help="the trace")
    about = "Print the trace as a Mermaid sequence diagram."
    show = whats.add_parser("show", help="a sequence diagram", description=about)
    show.add_argument("file", metavar="FILE", type=_path, help="the trace")
    about = "only what concerns this allocation"
    show.add_argument("--allocation", metavar="ID", help=about)


def _add_verify(verbs: Any) -> None:
    about = (
        "Run the verification campaign of a source tree, which takes minutes, and write a report. "
        "Interrupted, it goes on where it was as long as the sources are the same. Exit code 1: "
        "something was found."
    )
    verify = verbs.add_parser("verify", help="verify a source tree", description=about)
    about = "the tree (default: the current directory, or where this is installed from)"
    verify.add_argument("--tree", metavar="DIR", help=about)
    about = "go on for so long, with new seeds and ever larger tasks (default: once)"
    verify.add_argument("--hours", metavar="H", help=about)
    about = "how much of everything, where it is not for --hours (default: 1)"
    verify.add_argument("--scale", metavar="S", help=about)
    about = "how many tasks at a time (default: one more than cores)"
    verify.add_argument("--jobs", metavar="N", help=about)
    about = "derive every task's seed from this one (default: a new one, which is printed)"
    verify.add_argument("--seed", metavar="N", help=about)
    about = "only this part of it; repeatable"
    verify.add_argument("--part", metavar="NAME", action="append", default=[], help=about)
    about = "where outcomes, logs and the page go (default .verify)"
    verify.add_argument("--output", metavar="DIR", help=about)
    verify.add_argument("--fresh", action="store_true", help="forget what was done before")


def _add_demo(verbs: Any) -> None:
    verbs.add_parser("demo", help="two allocations from request to release, checked")


_PARSERS: Final[dict[str, Callable[[Any], None]]] = {
    "serve": _add_serve,
    "run": _add_run,
    "exec": _add_exec,
    "request": _add_request,
    "end": _add_end,
    "list": _add_list,
    "doctor": _add_doctor,
    "trace": _add_trace,
    "verify": _add_verify,
    "demo": _add_demo,
}


def _add_socket(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, "socket", "PATH", "the provider's socket")


def _add_state_dir(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, "state_dir", "DIR", "where the provider keeps its journal")


def _add_places(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, "image_root", "DIR", "where images are")
    _add_path(parser, "uenv_base", "DIR", "where they appear inside an allocation")


def _add_path(parser: argparse.ArgumentParser, name: str, what: str, about: str) -> None:
    path = DEFAULT_PATHS[name]
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        metavar=what,
        type=_place_inside if name == "uenv_base" else _path,
        default=path,
        help=f"{about} (default {path})",
    )


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--namespaces",
        metavar="TYPES",
        required=True,
        help="pid, net and mount, in any order and separated by commas; may be empty",
    )
    about = "a squashfs image below the image root; needs mount"
    parser.add_argument("--uenv", metavar="IMAGE", help=about)
    _add_socket(parser)
    parser.add_argument(
        "--fallback",
        choices=["unavailable", "always", "never"],
        default="unavailable",
        help="when to make the namespaces here: if no provider is reached (default); always, on a "
        "node without one, and none is asked; or never",
    )


def _add_span(parser: argparse.ArgumentParser, name: str, about: str) -> None:
    span_s = DEFAULT_SPANS_S[name]
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        metavar="S",
        type=_seconds,
        default=span_s,
        help=f"{about} (default {span_s:g} s)",
    )


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=["linux", "simulated"],
        default="linux",
        help="real namespaces (default), or a simulated node for trying out, on both sides",
    )


# --- Reading the command line ------------------------------------------------------------------


class _Version(argparse.Action):
    """Looks the version up only when it is requested."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version(DISTRIBUTION)
        except PackageNotFoundError:
            number = "(not installed)"
        print(PROGRAM, number)
        parser.exit()


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse the command line; for `run` and `exec`, what follows the first `--` is not parsed."""
    is_launcher = words[:1] in (["run"], ["exec"])
    cut = words.index("--") if is_launcher and "--" in words else len(words)
    options = build_parser(*words[:1]).parse_args(words[:cut])
    if is_launcher:
        if options.command and options.command[0].startswith("-"):
            options.parser.error(f"options come first, before {options.command[0]} and --")
        # If words of the command came before it, that `--` is the command's.
        options.command += words[cut if options.command else cut + 1 :]
    return options


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError
    return seconds


_seconds.__name__ = "number of seconds"  # argparse uses the name in its errors


def _path(text: str) -> str:
    # Of a variable that is not set. It would mean the current directory.
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _place_inside(text: str) -> str:
    # It is told to consumers, and what is there is covered inside.
    if not _path(text).startswith("/") or text == "/" or posixpath.normpath(text) != text:
        raise argparse.ArgumentTypeError(f"not an absolute and plain path below /: {text!r}")
    return text


def _user(text: str) -> int:
    number = int(text)
    if not 0 <= number <= ID_MAX:
        raise ValueError
    return number


_user.__name__ = "user id"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_count.__name__ = "number"


def _mode(text: str) -> int:
    mode = int(text, 8)
    if not 0 <= mode <= 0o777:
        raise ValueError
    return mode


_mode.__name__ = "octal mode"


def _group(text: str) -> int:
    if text.isdecimal() and int(text) <= ID_MAX:
        return int(text)
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {text!r}") from None
