"""The shape of the tree, read from its imports: arrows point inward, danger has one owner.

Each rule is a function from a module to what is wrong with it, and is shown able to fail below.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("statemachine", "transport", "linux")
"""From the inside outward: each may import those before it."""

FUNCTION_LINES_MAX: Final = 60

CLOCK_READERS: Final = (
    r"transport/request/(exchange|blocking)\.py|linux/(cli/\w+|demo/command|self_service)\.py"
)

FORGES: Final = r"linux/forge/(client|child|spawn|exec)\.py"
"""Where processes may come from."""

IMPORT_OWNERS: Final = {
    "msgpack": r"transport/codec\.py",
    "transitions": r"statemachine/(table|machine)\.py",
    "ctypes": r"linux/syscalls\.py",
    "sqlite3": r"linux/journal\.py",
    "subprocess": FORGES,
    "multiprocessing": FORGES,
    "pty": FORGES,
    "time": CLOCK_READERS,
    "datetime": CLOCK_READERS,
}
"""Who alone may import a thing; the only packages not of the standard library are among them."""

NAME_OWNERS: Final = {
    r"os\.(fork|forkpty|posix_spawnp?|spawn[lv]p?e?|system|popen)": FORGES,
    r"asyncio\.create_subprocess_\w+": FORGES,
    r"os\.(close|closerange|dup|dup2)": r"transport/descriptors\.py",
    r"fcntl\.F_DUPFD\w*": r"transport/descriptors\.py",
    # A thread that is not waited for uses what is closed.
    r"threading\.Thread|_thread\..*": (
        r"linux/(threads|sinks|pool|demo/processes)\.py|transport/serve/work\.py"
    ),
    # A cgroup is removed only after it was read that it is empty.
    r"(.*\.)?rmdir": r"linux/cgroups\.py",
    # However the socket is called that they are asked of.
    r"(.*\.)?(sendmsg|sendmsg_afalg|recvmsg|recvmsg_into|send_fds|recv_fds)": (
        r"transport/channel\.py"
    ),
    # What would hide an import from all the rules here.
    r"(builtins\.)?__import__|importlib\.__import__": "(no module)",
    # What is imported by name there is imported for mypy as well: `test_packaging.py` compares.
    r"importlib\.import_module": r"statemachine/exports\.py",
}
"""Who alone may even mention a name."""

PURE: Final = r"statemachine/(?!(exports|record)\.py).*|transport/(codec|framing|trace/\w+)\.py"
PURE_IMPORTS: Final = re.compile(
    "__future__|abc|collections|dataclasses|enum|functools|itertools|json|operator|re|string|struct"
    "|types|typing|unicodedata"
)
"""What the standard library has that neither touches nor asks anything outside the program."""

TESTING: Final = r"\w+/testing/.*"
"""Tools for tests: they touch what they like, and only tests and each other may import them."""
FOR_TESTING: Final = ("hypothesis", "pytest", "specs", "z3")


@dataclass(frozen=True)
class Module:
    """One source file: where it stands and what it says."""

    path: str
    """Relative to the root, as in `transport/codec.py`."""
    text: str

    @property
    def package(self) -> str:
        return self.path.partition("/")[0]

    @property
    def is_testing(self) -> bool:
        return re.fullmatch(TESTING, self.path) is not None

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text, self.path)))

    @cached_property
    def imports(self) -> list[tuple[int, str, str]]:
        """(line, dotted origin, name here); an origin in the own package begins with a dot."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    origin = alias.name if alias.asname else alias.name.partition(".")[0]
                    found.append((node.lineno, origin, alias.asname or origin))
                    if origin != alias.name:
                        found.append((node.lineno, alias.name, ""))
            elif isinstance(node, ast.ImportFrom):
                start = "." * node.level + (f"{node.module}." if node.module else "")
                for alias in node.names:
                    found.append((node.lineno, start + alias.name, alias.asname or alias.name))
        return found

    @cached_property
    def names(self) -> list[tuple[int, str]]:
        """(line, dotted name) of all that is mentioned, with the module's own aliases undone."""
        origins = {name: origin for _, origin, name in self.imports if name}
        found = [(line, origin) for line, origin, _ in self.imports]
        for node in self.nodes:
            if isinstance(node, ast.Name | ast.Attribute):
                parts: list[str] = []
                inner: ast.expr = node
                while isinstance(inner, ast.Attribute):
                    parts.append(inner.attr)
                    inner = inner.value
                first = origins.get(inner.id, inner.id) if isinstance(inner, ast.Name) else "()"
                found.append((node.lineno, ".".join([first, *reversed(parts)])))
        return found


Rule = Callable[[Module], Iterator[tuple[int, str]]]
RULES: dict[str, Rule] = {}


def rule(check: Rule) -> Rule:
    RULES[check.__name__] = check
    return check


@rule
def imports_point_inward(module: Module) -> Iterator[tuple[int, str]]:
    inner = PACKAGES[: PACKAGES.index(module.package)]
    extra = FOR_TESTING if module.is_testing else ()
    for line, origin, _ in module.imports:
        top = origin.partition(".")[0]
        if origin.startswith("." * (module.path.count("/") + 1)):
            yield line, f"{origin} leaves the package by a relative import"
        elif top == module.package:
            yield line, f"{origin} is of the same package: import it relatively"
        elif top and top not in (*sys.stdlib_module_names, *inner, *IMPORT_OWNERS, *extra):
            yield line, f"{origin} is not for {module.package}"
        elif "testing" in origin.split(".") and not module.is_testing:
            yield line, f"{origin} is for tests"


@rule
def dangerous_modules_have_one_owner(module: Module) -> Iterator[tuple[int, str]]:
    if module.is_testing:
        return
    for line, origin, _ in module.imports:
        owner = IMPORT_OWNERS.get(origin.partition(".")[0])
        if owner and not re.fullmatch(owner, module.path):
            yield line, f"{origin} is only for {owner}"


@rule
def dangerous_calls_have_one_owner(module: Module) -> Iterator[tuple[int, str]]:
    if module.is_testing:
        return
    for line, name in module.names:
        for pattern, owner in NAME_OWNERS.items():
            if re.fullmatch(pattern, name) and not re.fullmatch(owner, module.path):
                yield line, f"{name} is only for {owner}"


@rule
def deciding_modules_are_pure(module: Module) -> Iterator[tuple[int, str]]:
    if not re.fullmatch(PURE, module.path) or module.is_testing:
        return
    for line, origin, _ in module.imports:
        top = origin.partition(".")[0]
        if top not in ("", *PACKAGES, *IMPORT_OWNERS) and not PURE_IMPORTS.fullmatch(top):
            yield line, f"{origin} touches the world"
    for line, name in module.names:
        if name in ("print", "input", "open", "breakpoint"):
            yield line, f"{name} touches the world"


@rule
def functions_can_be_taken_in_at_once(module: Module) -> Iterator[tuple[int, str]]:
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) else node.body
            # A docstring is not held against anyone; the signature is.
            lines = (node.body[0].lineno - node.lineno) + (
                (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            )
            if lines > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines} lines, over {FUNCTION_LINES_MAX}"


@rule
def nothing_is_put_off(module: Module) -> Iterator[tuple[int, str]]:
    for line, text in enumerate(module.text.splitlines(), 1):
        if re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", text):
            yield line, text.strip()


@rule
def who_acts_is_named(module: Module) -> Iterator[tuple[int, str]]:
    """A peer, a consumer, a user: each has a name, but for the user `nobody`."""
    unnamed = r"(?i:whoe?ver|(some|any|every)bod[y])|(?<![\"`s])(?<!as_)[Nn]obody(?! MUST)"
    for line, text in enumerate(module.text.splitlines(), 1):
        if re.search(unnamed, text):
            yield line, text.strip()


COINED: Final = re.compile(
    r"(?<![a-z])(dea[f]|farewel[l]|do[o]rs?|do[o]rkeeper|cag[e][sd]?|deb[t]s?|hop[e]s?|dealin[g]s"
    r"|stumbl[e]\w*|kindl[y]|wis[h](es|ed)?|babbl[e]\w*|circl[e]s?|rein[s]|word of the en[d]"
    r"|(?-i:THEIR[S]))(?![a-z])",
    re.IGNORECASE,
)
"""Metaphors for what the field has a word for: read_closed, hook, notice, request, cycle."""

AS_IN_ENGLISH: Final = re.compile(
    # SVG's element.
    r'"circl[e]"'
)
"""Where such a word is not ours."""


@rule
def the_fields_words_are_used(module: Module) -> Iterator[tuple[int, str]]:
    for line, text in enumerate(module.text.splitlines(), 1):
        if COINED.search(AS_IN_ENGLISH.sub("", text)):
            yield line, text.strip()


def modules(*folders: str, suffix: str = "py") -> list[Module]:
    return [
        Module(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))
    ]


def violations(check: Rule, of: list[Module]) -> list[str]:
    return [f"{m.path}:{line}: {what}" for m in of for line, what in check(m)]


@pytest.mark.parametrize("name", RULES)
def test_basic_the_packages_keep_the_rule(name: str) -> None:
    assert violations(RULES[name], modules(*PACKAGES)) == []


@pytest.mark.parametrize(
    "check", [nothing_is_put_off, who_acts_is_named, the_fields_words_are_used]
)
def test_the_rules_of_words_are_kept_in_tests_and_specs_too(check: Rule) -> None:
    texts = [Module(path.name, path.read_text(encoding="utf-8")) for path in ROOT.glob("*.md")]
    for suffix in ("py", "md", "[ch]"):
        texts += modules("tests", "specs", "bench", suffix=suffix)
    assert len(texts) > 150
    assert violations(check, texts) == []


SHARED_NAMES: Final = {
    # The reference model has what the chapters name, and takes nothing from the packages.
    "Allocation": {"specs/model.py", "statemachine/provider/models.py"},
    "Limits": {"specs/model.py", "statemachine/provider/limits.py"},
    "Provider": {"specs/model.py", "transport/serve/provider.py"},
    # And those of `linux` are those of `transport`, with this node's defaults.
    "Consumer": {"specs/model.py", "transport/request/blocking.py", "linux/consumer.py"},
    "AsyncConsumer": {"transport/request/asynchronous.py", "linux/consumer_async.py"},
    # What the table MESSAGE moves is named for the table, as `Service` and `Allocation` are.
    "Message": {"statemachine/messages.py", "statemachine/provider/models.py"},
}
"""Classes of the same thing, and the modules in which each is defined."""


def classes_of(module: Module) -> set[str]:
    """Name the classes and the aliases of types that a module defines, without underscores."""
    found = set()
    for node in ast.parse(module.text, module.path).body:
        match node:
            case ast.ClassDef(name=name) if not name.startswith("Test"):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id="TypeAlias")):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() | ast.BinOp()):
                if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name):
                    found.add(name)
    return {name.lstrip("_") for name in found}


def names_of_several(of: list[Module]) -> dict[str, set[str]]:
    """Say which classes and aliases are defined in more than one module, and in which."""
    homes: dict[str, set[str]] = {}
    for module in of:
        for name in classes_of(module):
            homes.setdefault(name, set()).add(module.path)
    return {name: paths for name, paths in homes.items() if len(paths) > 1}


def test_a_name_of_a_class_means_one_thing() -> None:
    assert names_of_several(modules(*PACKAGES, "tests", "specs", "bench")) == SHARED_NAMES


@pytest.mark.parametrize(
    "text",
    ["class Lamp: ...", "class _Lamp: ...", "Lamp: TypeAlias = int", "Lamp = tuple[int, str]"],
)
def test_a_second_class_of_a_name_is_seen(text: str) -> None:
    lamps = [Module("linux/lamp.py", "class Lamp: ..."), Module("tests/test_lamp.py", text)]
    assert names_of_several(lamps) == {"Lamp": {"linux/lamp.py", "tests/test_lamp.py"}}


def test_tests_constants_and_local_classes_may_have_the_same_name() -> None:
    text = "class TestLamp: ...\nLAMP = table[1]\ndef f():\n    class Lamp: ..."
    assert names_of_several([Module("tests/a.py", text), Module("tests/b.py", text)]) == {}


VIOLATIONS: Final = [
    (imports_point_inward, "statemachine/a.py", "import transport"),
    (imports_point_inward, "statemachine/a.py", "from transport.codec import decode_message"),
    (imports_point_inward, "transport/a.py", "def f():\n    from linux import forge"),
    (imports_point_inward, "transport/a.py", "from transport.codec import decode_message"),
    (imports_point_inward, "transport/a.py", "from ..statemachine import messages"),
    (imports_point_inward, "linux/cli/a.py", "from ...transport import serve"),
    (imports_point_inward, "transport/serve/a.py", "from ...statemachine import messages"),
    (imports_point_inward, "linux/a.py", "from tests import census"),
    (imports_point_inward, "linux/a.py", "import psutil"),
    (imports_point_inward, "linux/a.py", "from specs import model"),
    (imports_point_inward, "linux/a.py", "import hypothesis"),
    (imports_point_inward, "linux/a.py", "from .testing import worlds"),
    (imports_point_inward, "linux/a.py", "from transport.testing.peer import Line"),
    (imports_point_inward, "transport/testing/a.py", "from linux.testing import worlds"),
    (imports_point_inward, "transport/testing/a.py", "from tests.support import census"),
    (dangerous_modules_have_one_owner, "transport/framing.py", "import msgpack.exceptions"),
    (dangerous_modules_have_one_owner, "statemachine/provider.py", "from transitions import core"),
    (dangerous_modules_have_one_owner, "linux/forge/client.py", "import ctypes as c"),
    (dangerous_modules_have_one_owner, "linux/backend.py", "import sqlite3"),
    (dangerous_modules_have_one_owner, "linux/cgroups.py", "from subprocess import run"),
    (dangerous_modules_have_one_owner, "transport/channel.py", "import time"),
    (dangerous_modules_have_one_owner, "linux/mounts.py", "from datetime import datetime"),
    (dangerous_calls_have_one_owner, "linux/forge/client.py", "def f(s): s.sock.recvmsg(1)"),
    (dangerous_calls_have_one_owner, "linux/forge/client.py", "f().sendmsg([b''])"),
    (dangerous_calls_have_one_owner, "linux/forge/client.py", "from socket import recv_fds as r"),
    (dangerous_calls_have_one_owner, "linux/forge/client.py", "import os\nos.close(3)"),
    (dangerous_calls_have_one_owner, "linux/forge/client.py", "import os as o\no.dup2(3, 4)"),
    (dangerous_calls_have_one_owner, "linux/forge/client.py", "from os import close as shut"),
    (dangerous_calls_have_one_owner, "linux/anchor.py", "import fcntl\nfcntl.F_DUPFD_CLOEXEC"),
    (dangerous_calls_have_one_owner, "linux/backend.py", "def f(path): path.parent.rmdir()"),
    (dangerous_calls_have_one_owner, "linux/anchor.py", "import os\nspawn = os.posix_spawn"),
    (dangerous_calls_have_one_owner, "linux/cli/command.py", "import os\nos.fork()"),
    (dangerous_calls_have_one_owner, "linux/root.py", "import threading\nthreading.Thread()"),
    (dangerous_calls_have_one_owner, "linux/cli/command.py", "__import__('ctypes')"),
    (dangerous_calls_have_one_owner, "linux/cli/command.py", "from importlib import import_module"),
    (deciding_modules_are_pure, "statemachine/provider.py", "import os.path"),
    (deciding_modules_are_pure, "statemachine/consumer.py", "import random"),
    (deciding_modules_are_pure, "statemachine/table.py", "import logging"),
    (deciding_modules_are_pure, "transport/codec.py", "from logging import getLogger"),
    (deciding_modules_are_pure, "transport/framing.py", "print('here')"),
    (functions_can_be_taken_in_at_once, "linux/a.py", "def f():\n" + "    pass\n" * 60),
    (nothing_is_put_off, "linux/a.py", "x = 1  # TO" + "DO: later"),
    (who_acts_is_named, "linux/a.py", "# Some" + "body else's."),
    (who_acts_is_named, "linux/a.py", "# Then no" + "body waits."),
    (the_fields_words_are_used, "linux/a.py", "is_de" + "af = True"),
    (the_fields_words_are_used, "linux/a.h", "enum { NO_DE" + "BT, OWED };"),
    (the_fields_words_are_used, "linux/a.md", "A Do" + "or for each call."),
]


@pytest.mark.parametrize(
    ("check", "path", "text"), VIOLATIONS, ids=lambda v: getattr(v, "__name__", None)
)
def test_the_rule_sees_a_violation(check: Rule, path: str, text: str) -> None:
    assert violations(check, [Module(path, text)]) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("transport/codec.py", "import msgpack\nfrom statemachine.messages import Message"),
        ("transport/channel.py", "import os\ndef f(s): s.recvmsg(1); os.read(1, 1)"),
        ("transport/descriptors.py", "import os, fcntl\nos.close(fcntl.fcntl(1, fcntl.F_DUPFD))"),
        ("statemachine/table.py", "import transitions\nfrom .messages import Message"),
        ("linux/cli/serve.py", "from ..backend import LinuxBackend"),
        ("linux/cli/serve.py", "import time\nprint(time.monotonic())\nprint('x'.close)"),
        ("linux/testing/a.py", "import time, pytest\nfrom specs import model"),
        ("linux/testing/a.py", "from transport.testing import peer\nfrom . import worlds"),
        ("transport/serve/a.py", "from ..channel import Channel"),
        ("linux/a.py", 'def f():\n    """Say.' + "\n" * 60 + '    """\n' + "    pass\n" * 55),
    ],
)
def test_no_rule_forbids_what_an_owner_does(path: str, text: str) -> None:
    assert [v for check in RULES.values() for v in violations(check, [Module(path, text)])] == []


def test_every_owner_is_a_module_that_exists() -> None:
    paths = [module.path for module in modules(*PACKAGES)]
    owners = {*IMPORT_OWNERS.values(), *NAME_OWNERS.values(), PURE} - {"(no module)"}
    unfilled = [o for o in sorted(owners) if not any(re.fullmatch(o, path) for path in paths)]
    assert unfilled == []


def test_no_folder_of_tests_can_shadow_a_package() -> None:
    """Each is a package, and so is `tests`: pytest puts none of them in front of `sys.path`."""
    folders = {(ROOT / m.path).parent for m in modules("tests")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


LOADED_BY_IMPORT: Final = """
import sys
before = set(sys.modules)
from statemachine import ConsumerKernel, ProviderKernel, events
ProviderKernel().receive(events.ProviderReady())
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_the_decider_brings_nothing_along_but_the_table_runner() -> None:
    run = subprocess.run(
        [sys.executable, "-I", "-c", LOADED_BY_IMPORT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    foreign = set(run.stdout.split()) - sys.stdlib_module_names
    assert foreign == {"statemachine", "transitions", "six"}
