"""The guards of the source, each with the bug of leaving it out, and what sees that.

A guard is a second look: it only ever matters when another program has done something in between.
So no plain test fails without it. In the source each is marked `# Guard: name.`; `test_canaries.py`
collects the marks, and each has to have a canary in here, which takes away the lines at the mark.
Where nothing else is said, the sweep of a stranger's act over every call of a life sees it.
"""

from __future__ import annotations

from typing import Final

from tests.campaign.canaries_tree import Change

GUARD: Final = "a second look that is left out"
"""The origin of these canaries."""

MARK: Final = r"# Guard: (?P<name>[^.]+)\."
"""How a guard is marked in the source: in the lines just before it."""

LINES_MAX: Final = 6
"""How far below its mark a guard begins, at most."""

_CGROUPS: Final = "linux/cgroups.py"
_ENDPOINT: Final = "transport/endpoint.py"
_ANCHOR: Final = "linux/anchor.py"
_JOURNAL: Final = "linux/journal.py"

SWEPT: Final[tuple[tuple[str, tuple[str, ...], Change], ...]] = (
    (
        "what is emptied was opened",
        ("linux", "end by consumer", "scope replaced, empty", "cgroups."),
        Change(
            _CGROUPS,
            "elif owner != self._token:\n                return True",
            "else:\n                pass",
        ),
    ),
    (
        "what was made was opened",
        ("linux", "end by consumer", "scope replaced", "cgroups."),
        Change(
            _CGROUPS,
            "self._was_made = self._was_made and _is_made_here_at(directory)",
            "pass",
        ),
    ),
    (
        "what is killed is ours",
        ("linux", "end by consumer", "stamped", "cgroups."),
        Change(
            _CGROUPS,
            "if owner == self._token:\n                self._kill_all",
            "if True:\n                self._kill_all",
        ),
    ),
    (
        "one owner",
        ("linux", "end by consumer", "stamped", "cgroups."),
        Change(_CGROUPS, "self._token, os.XATTR_CREATE)", "self._token)"),
    ),
    (
        "what is marked is ours",
        ("linux", "end by consumer", "stamped as own", "cgroups."),
        Change(
            _CGROUPS,
            "if _read_owner(directory.fileno()) != self._token:\n                raise",
            "if False:\n                raise",
        ),
    ),
    (
        "what lost its token was claimed here",
        ("linux", "end by consumer", "unstamped", "cgroups._open_directory"),
        Change(
            _CGROUPS, "if self._inode is None or self._inode != _inode_of(directory):", "if True:"
        ),
    ),
    (
        "the start lock is removed by who has it",
        ("simulated", "recovered", "other start lock"),
        Change(
            _ENDPOINT,
            "if _is_at(lock_path, lock):\n                    syscall",
            "if True:\n                    syscall",
        ),
    ),
    (
        "the start lock is a lock",
        ("simulated", "recovered", "other start lock"),
        Change(_ENDPOINT, "if syscall(os.fstat, lock.fileno()).st_size:", "if False:"),
    ),
    (
        "the socket that is removed is ours",
        ("simulated", "recovered", "stranger listens"),
        Change(_ENDPOINT, "if _inode_of(path) == inode:", "if True:"),
    ),
    (
        "the file that is removed is ours",
        ("linux", "recovered", "other scope file", "files.OwnFile"),
        Change(
            "linux/files.py",
            "if _identity(syscall(self.path.lstat)) == _identity(self.status):",
            "if syscall(self.path.lstat):",
        ),
    ),
    (
        "what is no socket is left alone",
        ("simulated", "recovered", "file for the socket"),
        Change(
            _ENDPOINT, "if not syscall(path.is_socket) or syscall(path.is_symlink):", "if False:"
        ),
    ),
    (
        "who listens is left alone",
        ("simulated", "recovered", "stranger listens"),
        Change(_ENDPOINT, "if _is_listening(path):", "if False:"),
    ),
    (
        "the number is the same process's",
        ("linux", "recovered", "number reused", "anchor._open_process"),
        Change(
            _ANCHOR,
            "if _is_other(anchor, identity, features) or not anchor.is_alive():",
            "if not anchor.is_alive():",
        ),
    ),
    (
        "the anchors' cgroup is read again",
        ("linux", "recovered", "number reused", "anchor._open_process"),
        Change(_ANCHOR, "if anchor.pid in members and anchor.is_alive()", "if anchor.is_alive()"),
    ),
)
"""
Seen by a sweep: the backend, the life, the act, where there are many calls the function that makes
them; and the change that leaves the guard out.
"""

TESTED: Final[tuple[tuple[str, str, Change], ...]] = (
    (
        "a tied scope has its anchor's token",
        "linux/test_forge.py::test_tied_forge_leaves_a_scope_alone_that_another_owner_had_before_its_anchor_was_made",
        Change(
            "linux/forge/child.py",
            "scope = Scope(Path(work.plan.scope), work.plan.token)",
            "scope = Scope(Path(work.plan.scope), Scope(Path(work.plan.scope), '').owner() or '')",
        ),
    ),
    (
        "the start lock is still at its path",
        "transport/test_endpoint.py::test_a_lock_that_was_removed_meanwhile_is_taken_again",
        Change(
            _ENDPOINT,
            "if not _is_at(lock_path, lock):",
            "if not _is_at(lock_path, lock) and False:",
        ),
    ),
    (
        "empty in two readings",
        "linux/test_cgroups.py::test_what_enters_between_two_readings_counts",
        Change(
            _CGROUPS,
            "return Use.RUNNING if self._note_populated(events) else Use.OVER",
            "return Use.OVER",
        ),
    ),
    (
        "a process is still listed when it is killed",
        "linux/test_cgroups.py::test_a_process_that_only_passes_through_while_a_scope_is_killed_lives",
        Change(
            _CGROUPS,
            "for pid in pidfds.keys() & set(self._processes_in(directory)):",
            "for pid in pidfds:",
        ),
    ),
    (
        "the instance that is locked is at its path",
        "linux/test_recovery.py::test_a_cgroup_that_was_made_anew_before_it_was_locked_is_locked",
        Change("linux/instance.py", "if is_open_as(path, directory):", "if True:"),
    ),
    (
        "the lock is still in its directory",
        "linux/test_journal.py::test_a_lock_that_was_removed_is_taken_again",
        Change(
            _JOURNAL,
            "is_locked = is_open_as(self._state_dir / LOCK_NAME, self._lock)",
            "is_locked = True",
        ),
    ),
    (
        "the journal is still the file that was opened",
        "linux/test_journal.py::test_a_journal_whose_file_is_another_is_lost",
        Change(_JOURNAL, "not (is_locked and self._path_is_ours())", "not is_locked"),
    ),
    (
        "a lock that is gone is taken again",
        "linux/test_journal.py::test_a_lock_that_was_removed_is_taken_again",
        Change(
            _JOURNAL,
            "if not is_open_as(self._state_dir / LOCK_NAME, self._lock):",
            "if False:",
        ),
    ),
    (
        "what was read has not changed meanwhile",
        "linux/test_journal.py::test_a_reader_sees_no_half_of_what_a_provider_changed_meanwhile",
        Change(_JOURNAL, " and _fingerprint(path) == fingerprint", ""),
    ),
)
"""Seen by a test, because a sweep reaches no state in which it matters; it is named."""
