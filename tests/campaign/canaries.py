"""Bugs that a programmer could have written, each with the layer of the suite that has to see it.

A canary is a change of a few words in a source file. It is what a careful programmer might do who
has not thought of one thing: what upstream really did, what the documentation of a call does not
say, what a table makes easy to forget. In the working tree nothing is changed: a layer runs on a
copy of it that has the bug (`canaries_tree`).

A canary that is not caught is a hole in the suite. One whose words do not fit the source any more
is an error as well: it protects nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tests.campaign.canaries_tree import DEADLINE_S, CanaryResult, Change, run_changed
from tests.campaign.guards import GUARD, SWEPT, TESTED


@dataclass(frozen=True)
class Layer:
    """A layer of the suite, and how much of it is enough."""

    name: str
    function: str
    """Of `canaries_layers`."""
    arguments: tuple[Any, ...] = ()
    is_seeded: bool = False
    """Whether it draws at random: then the seed is its last argument."""
    is_linux: bool = False
    """Whether it makes real namespaces, cgroups or mounts."""

    def run(
        self, changes: tuple[Change, ...] = (), seed: int = 0, deadline_s: float = DEADLINE_S
    ) -> CanaryResult:
        """Run it on a copy of the tree where the source reads otherwise."""
        changed: dict[str, str] = {}
        for change in changes:
            changed[change.path] = change.applied(changed.get(change.path))
        arguments = (*self.arguments, seed) if self.is_seeded else self.arguments
        call = f"tests.campaign.canaries_layers:{self.function}"
        return run_changed(changed, call, *arguments, deadline_s=deadline_s)


@dataclass(frozen=True)
class Canary:
    """A bug, and who sees it."""

    name: str
    """What is wrong, as a user would say who has met it."""
    origin: str
    """Where it was met, or what makes it likely."""
    layer: Layer
    changes: tuple[Change, ...]
    also: Layer | None = None
    """A second layer that sees it, whatever it draws; tried in campaigns, with many seeds."""


def _bug(name: str, origin: str, layer: Layer, *words: str, also: Layer | None = None) -> Canary:
    """Make a canary; `words`: of each change the file, what stands there and what is to."""
    changes = map(Change, words[::3], words[1::3], words[2::3])
    return Canary(name, origin, layer, tuple(changes), also)


def _explorer(space: str) -> Layer:
    return Layer("explorer", "explorer", (space,))


def _model(table: str, names: str = "ab") -> Layer:
    return Layer("reference model", "model", (table, names))


def _strangers(backend: str, *swept: str) -> Layer:
    return Layer("strangers", "interference", (backend, *swept), is_linux=backend == "linux")


def _in(name: str, file: str, *tests: str, is_linux: bool = False) -> Layer:
    selected = tuple(f"{file}::{test}" for test in tests) or (file,)
    return Layer(name, "tests", selected, is_linux=is_linux)


_channel = partial(_in, "channel", "transport/test_channel.py")
_codec = partial(_in, "codec", "transport/test_codec.py")
_framing = partial(_in, "framing", "transport/test_framing.py")
_provider = partial(_in, "provider", "statemachine/test_provider.py")
_messages = partial(_in, "messages", "statemachine/test_messages.py")
_table = partial(_in, "table", "statemachine/test_table.py")
_descriptors = partial(_in, "descriptors", "transport/test_descriptors.py")
_driver = partial(_in, "driver", "transport/test_serve.py")
_fairness = partial(_in, "fairness", "transport/test_fairness.py")
_liar = partial(_in, "lying provider", "suites/test_lying_provider.py")
_journal = partial(_in, "journal", "linux/test_journal.py")
_recovery = partial(_in, "recovery", "linux/test_recovery.py")
_backend = partial(_in, "backend", "linux/test_backend.py", is_linux=True)
_namespaces = partial(_in, "namespaces", "linux/test_namespaces.py", is_linux=True)
_mounts = partial(_in, "mounts", "linux/test_mounts.py", is_linux=True)
_forge = partial(_in, "forge", "linux/test_forge.py", is_linux=True)
_threats = partial(_in, "threats", "suites/test_threats.py", is_linux=True)
_hostile = partial(_in, "hostile peers", "suites/test_hostile.py", is_linux=True)
_lifetime = partial(_in, "run's lifetime", "linux/test_cli_run_lifetime.py", is_linux=True)
_serve = partial(_in, "serve", "linux/test_cli_serve.py", is_linux=True)
_audit = partial(_in, "audit", "linux/test_cli_audit.py", is_linux=True)
_interruption = partial(_in, "interruption", "linux/test_interruption.py")
_linux = partial(_in, "contract, Linux", "linux/test_backend_contract.py", is_linux=True)

_PREEMPTED: Final = "test_in_every_order_with_one_preemption_a_life_keeps_the_rules"
_AT_RANDOM: Final = "test_in_an_order_at_random_a_life_keeps_the_rules"


def _virtual(life: str) -> Layer:
    tests = (f"{each}[{life}]" for each in (_PREEMPTED, _AT_RANDOM))
    return _in("virtual loop", "suites/test_virtual.py", *tests)


_sinks = partial(_in, "sinks", "linux/test_sinks.py")

STATEFUL: Final = Layer("stateful", "stateful", is_seeded=True)

_SERVICE: Final = "statemachine/provider/service.py"
_ALLOCATIONS: Final = "statemachine/provider/allocations.py"
_ANSWERS: Final = "statemachine/provider/answers.py"
_STATE: Final = "statemachine/provider/state.py"
_MODELS: Final = "statemachine/provider/models.py"
_CONSUMER: Final = "statemachine/consumer.py"
_LIFECYCLE: Final = "statemachine/lifecycle.py"
_TABLE: Final = "statemachine/table.py"
_MESSAGES: Final = "statemachine/messages.py"
_CODEC: Final = "transport/codec.py"
_FRAMING: Final = "transport/framing.py"
_CHANNEL: Final = "transport/channel.py"
_DESCRIPTORS: Final = "transport/descriptors.py"
_SERVE: Final = "transport/serve/provider.py"
_PEERS: Final = "transport/serve/peers.py"
_WORK: Final = "transport/serve/work.py"
_TIMERS: Final = "transport/serve/timers.py"
_EXCHANGE: Final = "transport/request/exchange.py"
_BACKEND: Final = "linux/backend.py"

_INTEND: Final = "self._journal.intend(Entry(name, token, AllocationState.REQUESTED, "

UPSTREAM: Final = "upstream"
"""The origin of the six bugs that the seed's own upstream has."""

CANARIES: Final = (
    # --- What upstream did ---------------------------------------------------------------------
    _bug(
        "a request that is repeated replaces the allocation",
        UPSTREAM,
        _explorer("a pair"),
        _ALLOCATIONS,
        "    if allocation is None:\n        uid =",
        "    if allocation is None or allocation.request == request:\n        uid =",
    ),
    _bug(
        "the end of what never was is confirmed",
        UPSTREAM,
        _model("allocation"),
        _LIFECYCLE,
        "*_stay(on.EndReceived, _UNKNOWN, then=(do.RefuseUnknown,)),",
        "*_stay(on.EndReceived, _UNKNOWN, then=(do.ConfirmEnd,)),",
    ),
    _bug(
        "what cannot be recorded is handed over all the same",
        UPSTREAM,
        _backend("test_an_intent_that_cannot_be_journaled_creates_nothing"),
        _BACKEND,
        f"        {_INTEND}",
        f"        with suppress(JournalError):\n            {_INTEND}",
        _BACKEND,
        "        assert allocation.anchor is not None\n",
        "        assert allocation.anchor is not None\n"
        "        ids = [entry.allocation_id for entry in self._journal.entries()]\n"
        "        if allocation.name not in ids:\n            return\n",
    ),
    _bug(
        "a request is refused while the provider is not ready",
        UPSTREAM,
        _model("allocation"),
        _SERVICE,
        "if state.service.state is ServiceState.STARTING and "
        "len(state.service.held) >= limits.waiting:",
        "if state.service.state is ServiceState.STARTING:",
    ),
    _bug(
        "the image's ending is cut out wherever it stands",
        UPSTREAM,
        _messages(),
        _MESSAGES,
        "{base.rstrip('/')}/{image.removesuffix(UENV_SUFFIX)}",
        "{base.rstrip('/')}/{image.replace(UENV_SUFFIX, '')}",
    ),
    _bug(
        "an image may be anywhere on the node",
        UPSTREAM,
        _mounts("test_what_is_no_image_is_refused_with_its_reason"),
        "linux/mounts.py",
        "resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS",
        "resolve = RESOLVE_NO_MAGICLINKS",
    ),
    _bug(
        "a type that is asked for twice is granted",
        UPSTREAM,
        _messages(),
        _MESSAGES,
        "types.count(kind) > 1]",
        "types.count(kind) > 2]",
    ),
    # --- The order of answers, and who gets which ----------------------------------------------
    _bug(
        "answers leave as soon as they are known",
        "errors carry no id",
        _explorer("one"),
        _ANSWERS,
        "        message = connection.messages[0]\n"
        "        state.fire_message(message, on.TurnCame)\n"
        "        if message.state is not MessageState.ANSWERED:\n"
        "            return\n"
        "        connection.messages.popleft()",
        "        message = connection.messages[-1]\n"
        "        state.fire_message(message, on.TurnCame)\n"
        "        if message.state is not MessageState.ANSWERED:\n"
        "            return\n"
        "        connection.messages.pop()",
        also=STATEFUL,
    ),
    _bug(
        "a consumer that asked for the end hears of it twice",
        "the push and the answer are the same message",
        _explorer("one"),
        _ALLOCATIONS,
        "            allocation.holders.discard(number)\n",
        "",
    ),
    _bug(
        "the end is pushed only to those that asked for it",
        "the push is the easiest message to forget",
        _explorer("a pair"),
        _ALLOCATIONS,
        "            allocation.holders.discard(number)\n",
        "            allocation.holders.discard(number)\n    allocation.holders.clear()\n",
    ),
    _bug(
        "an asker who came while it was made is forgotten",
        "only the first asker's connection is kept",
        _explorer("a pair"),
        _ALLOCATIONS,
        "    for number in sorted(allocation.asked):\n        for message",
        "    for number in sorted(allocation.asked)[:1]:\n        for message",
    ),
    _bug(
        "asked for twice while it is made, it is made twice",
        "a retry of an impatient consumer",
        _explorer("duplicates"),
        _LIFECYCLE,
        "*_stay(on.RequestRepeated, _REQUESTED, then=(do.AddAsker,)),",
        "*_stay(on.RequestRepeated, _REQUESTED, then=(do.AddAsker, do.CreateNamespaces)),",
    ),
    _bug(
        "another request gets what the first one asked for",
        "the id alone is looked up",
        _model("allocation"),
        _ALLOCATIONS,
        "on.RequestRepeated if request == allocation.request else on.RequestConflicting",
        "on.RequestRepeated if request is not None else on.RequestConflicting",
    ),
    _bug(
        "a refused frame does not close the connection",
        "the stream cannot be read any further",
        _model("allocation"),
        _LIFECYCLE,
        "Row(on.TurnCame, _UNREADABLE, _ANSWERED, (do.Refuse, do.CloseConnection)),",
        "Row(on.TurnCame, _UNREADABLE, _ANSWERED, (do.Refuse,)),",
    ),
    # --- Ends and releases ---------------------------------------------------------------------
    _bug(
        "the end is announced before it is decided what is left",
        "announcing is quick and releasing is slow",
        _explorer("one"),
        _LIFECYCLE,
        "_RELEASE: Final = (do.ReleaseNamespaces, start(Timer.RELEASE))",
        "_RELEASE: Final = (do.AnswerEnd, do.PushEnd, do.ReleaseNamespaces, start(Timer.RELEASE))",
    ),
    _bug(
        "it is released when its descriptors have left",
        "descriptors keep namespaces alive, so why keep the rest",
        _explorer("one"),
        _LIFECYCLE,
        "_HANDED_OFF, (do.RecordHandoff,)",
        "_HANDED_OFF, (do.RecordHandoff, do.ReleaseNamespaces)",
        also=STATEFUL,
    ),
    _bug(
        "a release that is delayed is not tried again",
        "the first try nearly always does it",
        _explorer("a failure"),
        _LIFECYCLE,
        "*_stay(on.ReleaseDelayed, _ENDED, then=(start(Timer.RETRY),)),",
        "*_stay(on.ReleaseDelayed, _ENDED),",
    ),
    _bug(
        "an end during the creation leaves its asker without an answer",
        "what has ended is not waited for",
        _explorer("one"),
        _LIFECYCLE,
        "(stop(Timer.RELEASE), do.AnswerEnd, do.PushEnd, do.FailAskers, do.Forget),",
        "(stop(Timer.RELEASE), do.AnswerEnd, do.PushEnd, do.Forget),",
    ),
    _bug(
        "an end does not take back the request that waits for the release",
        "two lives of one name are easily mixed up",
        _explorer("a pair"),
        _LIFECYCLE,
        "*_stay(on.EndReceived, _ENDED, then=(do.WithdrawDeferred,)),",
        "*_stay(on.EndReceived, _ENDED),",
    ),
    _bug(
        "a provider that was overdue announces the end again when it is done",
        "the deadline is an answer as well",
        _model("allocation"),
        _ALLOCATIONS,
        "    allocation.is_announced = True\n",
        "    pass\n",
    ),
    _bug(
        "what is released is handed over when its turn comes",
        "announcing the end before refusing the askers; found by a life that mutants are put to",
        _in(
            "provider",
            "statemachine/test_provider.py",
            "test_what_is_released_before_its_turn_is_not_handed_over",
        ),
        _LIFECYCLE,
        "_RELEASE_GRANTED: Final = (stop(Timer.CLAIM), do.WithdrawGrants, *_RELEASE)",
        "_RELEASE_GRANTED: Final = (stop(Timer.CLAIM), *_RELEASE)",
    ),
    # --- Claims, adoption, limits --------------------------------------------------------------
    _bug(
        "the claim timer runs on when a consumer asks again",
        "the row that starts a timer and the row that stops it are far apart",
        _explorer("a crash, asked again"),
        _LIFECYCLE,
        "then=(do.AddAsker, stop(Timer.CLAIM), do.GrantAskers),",
        "then=(do.AddAsker, do.GrantAskers),",
    ),
    _bug(
        "it is not looked whether a consumer is left to claim it when a connection is lost",
        "an allocation is not a connection; but one has to be there",
        _explorer("a death"),
        _SERVICE,
        "            allocation.asked.discard(number)\n"
        "            check_claim(state, allocation)\n",
        "            allocation.asked.discard(number)\n",
    ),
    _bug(
        "what was handed over counts as created after a restart",
        "the journal says two things that look alike",
        _model("allocation"),
        _LIFECYCLE,
        "Row(on.HandedOffAdopted, _UNKNOWN, _HANDED_OFF,",
        "Row(on.HandedOffAdopted, _UNKNOWN, _CREATED,",
    ),
    _bug(
        "what is found half made after a crash is left there",
        "no consumer asks for it",
        _explorer("a crash"),
        _LIFECYCLE,
        "Row(on.RemainsFound, _UNKNOWN, _ENDED, _RELEASE),",
        "Row(on.RemainsFound, _UNKNOWN, _ENDED),",
        also=STATEFUL,
    ),
    _bug(
        "names that are remembered are lost in a snapshot",
        "a field is added in one place of three",
        _explorer("one"),
        _STATE,
        "        self.remember(remembered)\n",
        "",
    ),
    _bug(
        "two equal messages of one connection are taken for one",
        "equal is not the same",
        _explorer("duplicates"),
        _MODELS,
        "    def is_request_for(",
        "    def __eq__(self, other):\n"
        "        return all(getattr(self, n) == getattr(other, n) for n in self.__slots__)\n\n"
        "    def is_request_for(",
    ),
    _bug(
        "one message more than allowed may be open",
        "off by one",
        _model("allocation"),
        _SERVICE,
        "        if count >= limits.open_per_connection:",
        "        if count > limits.open_per_connection:",
    ),
    _bug(
        "one allocation more than allowed may be alive",
        "off by one",
        _in(
            "provider",
            "statemachine/test_provider.py",
            "test_allocations_too_many_of_one_user_are_refused_until_one_is_released",
        ),
        _ALLOCATIONS,
        "    if allocation is None and usage.allocations >= most:",
        "    if allocation is None and usage.allocations > most:",
    ),
    _bug(
        "the newest name is forgotten instead of the oldest",
        "a dictionary keeps its order, and one has to know which end is which",
        _model("allocation"),
        _STATE,
        "del self.remembered[next(iter(self.remembered))]",
        "self.remembered.popitem()",
    ),
    # --- The consumer --------------------------------------------------------------------------
    _bug(
        "nothing is owed to a provider that was not waited for",
        "it has not answered, so it has made nothing",
        _explorer("a slow answer"),
        _LIFECYCLE,
        "_SELF_OWING: Final = (do.OweEnd, *_SELF)",
        "_SELF_OWING: Final = _SELF",
        also=STATEFUL,
    ),
    _bug(
        "the descriptors of an answer that comes too late are kept",
        "a late answer is still an answer",
        _explorer("a slow answer"),
        _LIFECYCLE,
        "*_stay(on.ResponseReceived, *_TURNED_AWAY, then=(do.DiscardDescriptors,)),",
        "*_stay(on.ResponseReceived, *_TURNED_AWAY),",
    ),
    _bug(
        "a refusal is papered over with self-service",
        "self-service is there for when something fails",
        _model("consumer"),
        _LIFECYCLE,
        "Row(on.CreationRefused, _ASKING, _REFUSED, (*_HANG_UP, do.ReportRefusal)),",
        "Row(on.CreationRefused, _ASKING, _SERVING_SELF, (*_HANG_UP, *_SELF)),",
    ),
    _bug(
        "a consumer that could not tell of the end does not try again",
        "the call was refused, and that is that",
        _explorer("a crash"),
        _LIFECYCLE,
        "Row(on.ProviderUnreachable, _DIALLING, _OWED, _LATER),",
        "Row(on.ProviderUnreachable, _DIALLING, _OWED),",
    ),
    _bug(
        "the types of an answer are compared as a set",
        "the order of the descriptors is what they are known by",
        _liar("test_a_lie_is_caught_and_the_consumer_serves_itself"),
        _CONSUMER,
        "if response.fd_types != request.namespaces:",
        "if set(response.fd_types) != set(request.namespaces):",
    ),
    # --- The traps of `transitions` ------------------------------------------------------------
    _bug(
        "there is a way from every state to every other",
        "transitions: auto_transitions is on by default",
        _table(),
        _TABLE,
        'auto_transitions=options.pop("auto_transitions", False)',
        "auto_transitions=True",
    ),
    _bug(
        "an event without a row is taken for one that changes nothing",
        "transitions: ignore_invalid_triggers, and guards that say False",
        _model("consumer"),
        _CONSUMER,
        "        if not (is_fed and holds and (moves_hold or moves_notice)):\n",
        "        if not (is_fed and holds):\n",
    ),
    _bug(
        "every allocation there ever was is known to the machine",
        "transitions: add_model keeps the model, and looks through all of them",
        _table(),
        _TABLE,
        "            orders: tuple[Order, ...] = self._triggers[event](model)\n",
        "            self._triggers[event].__self__.machine.models.append(model)\n"
        "            orders: tuple[Order, ...] = self._triggers[event](model)\n",
    ),
    # --- Frames --------------------------------------------------------------------------------
    _bug(
        "the length of a frame is little-endian",
        "that of the machine is",
        _framing(),
        _FRAMING,
        'return len(body).to_bytes(HEADER_BYTES, "big")',
        'return len(body).to_bytes(HEADER_BYTES, "little")',
        _FRAMING,
        'self._buffer[:HEADER_BYTES], "big")',
        'self._buffer[:HEADER_BYTES], "little")',
    ),
    _bug(
        "a frame may be empty",
        "an empty frame is no message",
        _framing(),
        _FRAMING,
        "if not 1 <= body_bytes <= FRAME_BYTES_MAX:",
        "if body_bytes > FRAME_BYTES_MAX:",
    ),
    _bug(
        "the longest frame is refused",
        "off by one",
        _framing(),
        _FRAMING,
        "if not 1 <= body_bytes <= FRAME_BYTES_MAX:",
        "if not 1 <= body_bytes < FRAME_BYTES_MAX:",
    ),
    _bug(
        "of a key that stands there twice the last counts",
        "that is what msgpack does, and what serde refuses",
        _codec(),
        _CODEC,
        "        if key in document:\n"
        '            raise FdPassing(f"the key {_shown(key)} stands there twice")\n',
        "",
    ),
    _bug(
        "bytes after the message are overlooked",
        "a reader reads what it needs",
        _codec(),
        _CODEC,
        "    except (ValueError, msgpack.exceptions.UnpackException) as error:",
        "    except msgpack.exceptions.ExtraData as error:\n"
        "        return error.unpacked\n"
        "    except (ValueError, msgpack.exceptions.UnpackException) as error:",
    ),
    _bug(
        "a type is read in any case",
        "be liberal in what you accept",
        _codec(),
        _CODEC,
        "kind = _NAMESPACE_TYPES.get(_text(place, value))",
        "kind = _NAMESPACE_TYPES.get(_text(place, value).capitalize())",
    ),
    _bug(
        "the types of a request are written in the seed's order",
        "a set has no order, and a list of them looks tidier sorted",
        _codec(),
        _CODEC,
        '"namespaces": [kind.value for kind in message.namespaces],',
        '"namespaces": sorted(kind.value for kind in message.namespaces),',
    ),
    _bug(
        "a field that is None is not written",
        "rmp-serde writes nil",
        _codec(),
        _CODEC,
        '                    "uenv_mount_path": message.uenv_mount_path,\n',
        '                    **({"uenv_mount_path": message.uenv_mount_path}'
        " if message.uenv_mount_path else {}),\n",
    ),
    # --- Descriptors on their way --------------------------------------------------------------
    _bug(
        "descriptors belong to the frame that their read began in",
        "Linux glues plain bytes in front of the next descriptors",
        _channel("test_cuts_into_three_deliver_the_same[plain, then three]"),
        _CHANNEL,
        "if arrival.last_byte < frame.end]",
        "if arrival.first_byte < frame.end]",
    ),
    _bug(
        "descriptors are inherited by whatever is executed",
        "socket.recv_fds ignores its flags",
        _channel("test_basic_handoff"),
        _CHANNEL,
        "socket.MSG_CMSG_CLOEXEC",
        "0",
    ),
    _bug(
        "a log that nothing reads grows in memory without end",
        "a queue before a thread is quickly written, and its bound forgotten",
        _sinks("test_full_pipe_blocks_no_writer_and_its_losses_are_told_in_their_place"),
        "linux/sinks.py",
        "if self._bytes and self._bytes + size > QUEUE_BYTES_MAX:",
        "if False:",
    ),
    _bug(
        "it is not looked whether descriptors were cut off",
        "recvmsg says so in a flag, and in no error",
        _channel(
            "test_a_receiver_without_descriptors_left_rejects_and_keeps_none",
            "test_a_provider_never_opens_what_a_consumer_sends",
        ),
        _CHANNEL,
        "is_truncated = bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))",
        "is_truncated = bool(flags & socket.MSG_TRUNC)",
    ),
    _bug(
        "descriptors are sent again with the rest of their frame",
        "a short write is a write",
        _channel("test_descriptors_leave_once_however_often_the_rest_is_sent"),
        _CHANNEL,
        "bundle, frame.bundle = frame.bundle, DescriptorBundle()",
        "bundle = frame.bundle if sent == len(frame.rest) else DescriptorBundle()",
    ),
    _bug(
        "there is room for one descriptor more than is allowed",
        "CMSG_SPACE pads where CMSG_LEN does not",
        _channel("test_never_more_descriptors_than_there_is_room_for"),
        _CHANNEL,
        "socket.CMSG_LEN(",
        "socket.CMSG_SPACE(",
    ),
    _bug(
        "descriptors that no message announces stay open",
        "they were not asked for, so they are not there",
        _channel("test_a_wrong_number_of_descriptors_is_rejected"),
        _CHANNEL,
        "if len(descriptors) != len(types):",
        "if len(descriptors) < len(types):",
    ),
    _bug(
        "descriptors of a frame that never became whole stay open",
        "an error path",
        _channel("test_a_frame_cut_short_is_lost_and_its_descriptors_closed"),
        _CHANNEL,
        "close_all(descriptor for arrival in dropped for descriptor in",
        "list(descriptor for arrival in dropped for descriptor in",
    ),
    _bug(
        "closing a descriptor twice closes that of another owner",
        "numbers are given out again at once",
        _descriptors(),
        _DESCRIPTORS,
        "        fd, self._fd = self._fd, -1\n        if fd < 0:",
        "        fd = self._fd\n        if fd < 0:",
    ),
    # --- Drivers -------------------------------------------------------------------------------
    _bug(
        "what an effect brings about is fed before the next effect is performed",
        "transitions and event loops make it easy to be called from within",
        _driver("test_all_of_an_events_effects_come_before_what_they_bring_about"),
        _SERVE,
        "        if self._is_feeding:\n            return\n",
        "",
    ),
    _bug(
        "work for one allocation is done side by side",
        "a pool is there to be used",
        _driver("test_a_release_waits_for_the_creation_before_it"),
        _WORK,
        "        if queue[0] is job:\n            self._begin(job)\n",
        "        self._begin(job)\n",
    ),
    _bug(
        "every byte of a frame gives the next one as much time again",
        "a timer is most easily started anew",
        _driver("test_bytes_that_trickle_in_buy_no_more_time"),
        _PEERS,
        "        if self._frame_deadline is None:\n",
        "        self._stop_frame_deadline()\n        if True:\n",
    ),
    _bug(
        "a user with many connections has many turns",
        "who is served next is whose frame is there",
        _in("turns", "transport/test_turns.py"),
        "transport/serve/turns.py",
        "            self._others.move_to_end(key)\n",
        "            pass\n",
    ),
    _bug(
        "who has sent most is served before who was idle",
        "turns are turns",
        _in("turns", "transport/test_turns.py"),
        "transport/serve/turns.py",
        "        self._idle_before[key] = waiting\n",
        "        self._others[key] = waiting\n",
    ),
    _bug(
        "who goes on is never served while others come",
        "one that was idle has the right of way",
        _in("turns", "transport/test_turns.py"),
        "transport/serve/turns.py",
        "        if self._in_a_row >= IDLE_IN_A_ROW_MAX:\n",
        "        if self._in_a_row < 0:\n",
    ),
    _bug(
        "releases are done by the threads that make namespaces",
        "work is work",
        _fairness("test_a_creation_does_not_wait_for_releases"),
        "transport/serve/work.py",
        "_Job(lane, self._releasers, work",
        "_Job(lane, self._creators, work",
    ),
    _bug(
        "every other try to release waits for all of them",
        "it follows from no message, so from no connection",
        _fairness("test_another_try_to_release_is_in_the_turn_of_the_first"),
        "transport/serve/provider.py",
        "        if self._asking or name not in self._lanes:\n",
        "        if True:\n",
    ),
    _bug(
        "a peer that does not read is read on",
        "what it asks is answered, and the answers are kept for it",
        _fairness("test_who_does_not_read_is_not_read_and_dropped_in_time"),
        _PEERS,
        "        if self.read_closed or self.is_blocked:\n",
        "        if self.read_closed:\n",
    ),
    _bug(
        "what waited for room is opened though it has ended",
        "a name outlives what it names",
        _fairness("test_what_ends_while_it_waits_for_room_is_not_handed_over"),
        _SERVE,
        "        if has_waited and self._kernel.response_of(name) is not response:\n",
        "        if False:\n",
    ),
    _bug(
        "an image that hangs takes a thread for each who asks for it",
        "a pool is there to be used",
        _fairness("test_one_image_that_hangs_makes_no_other_image_wait"),
        _WORK,
        "self._turns.take(lambda job: job.image not in self._images)",
        "self._turns.take()",
    ),
    _bug(
        "a connection that its user has closed counts until it is read",
        "it was open when it was counted last",
        _driver("test_a_connection_that_its_user_has_closed_does_not_count"),
        _PEERS,
        "accept_if(self._refusal_of)",
        "accept_if(self._objection_to)",
    ),
    _bug(
        "an image that an earlier provider mounted is never let go",
        "an image is let go by the provider that mounts it",
        _driver("test_what_an_earlier_provider_mounted_is_tidied_up_after_its_end"),
        "transport/serve/work.py",
        "                self.has_images = any(x.request.uenv_image for x in recovery.adoptions)\n",
        "",
    ),
    _bug(
        "what an earlier provider has ended is not remembered",
        "no consumer is there to ask for it",
        _driver("test_what_an_earlier_provider_ended_is_confirmed_again"),
        _SERVE,
        "        self._kernel.remember(recovery.remembered)\n",
        "",
    ),
    _bug(
        "descriptors are taken for what the provider says they are",
        "fd_types says it, and who would lie",
        _liar("test_a_lie_is_caught_and_the_consumer_serves_itself"),
        _EXCHANGE,
        "self._arrived_identities = verify_bundle(bundle, self.inspector)\n",
        "self._arrived_identities = tuple(\n"
        "                    self.inspector.inspect(each.fileno()) for _, each in bundle\n"
        "                )\n",
    ),
    # --- Drivers, in an order that hardly ever comes -------------------------------------------
    _bug(
        "the deadline of a frame goes on when it is whole, and hits the next one",
        "what survived the tests of before: state that outlives what it belongs to",
        _virtual("in pieces"),
        _PEERS,
        "                self._stop_frame_deadline()\n                self._take(event_of",
        "                self._take(event_of",
    ),
    _bug(
        "what is handed over to a peer that takes nothing any more is reported as sent",
        "what survived the tests of before: what is reported is not what happened",
        _virtual("left alone"),
        _PEERS,
        "        if self.write_closed:\n            return False\n",
        "        if self.write_closed:\n            return True\n",
        _PEERS,
        "        return not self.write_closed\n\n    def _offer",
        "        return True\n\n    def _offer",
    ),
    _bug(
        "answers that wait when a connection is closed are lost",
        "what survived the tests of before: closing does not wait",
        _virtual("closed while it waits"),
        _PEERS,
        '            self._start_linger("closed")\n        else:\n',
        '            self.drop("closed")\n        else:\n',
    ),
    _bug(
        "a timer that is to be stopped runs out all the same",
        "it is forgotten, so it is taken for stopped",
        _virtual("left alone"),
        _TIMERS,
        "        if handle is not None:\n            handle.cancel()\n",
        "        if handle is None:\n            return\n",
    ),
    _bug(
        "the pauses between tries to release go on in the next life of an id",
        "a name outlives what it names",
        _virtual("again and again"),
        _SERVE,
        "            self._timers.forget(name)\n",
        "",
    ),
    _bug(
        "who reads at last is not read again",
        "a wake-up that is lost: the socket says once that there is something to read",
        _virtual("it reads no more"),
        _PEERS,
        '            self.drop("closed")\n        else:\n            self._others.enqueue(self)\n',
        '            self.drop("closed")\n',
    ),
    _bug(
        "an image that there was no turn for is made after all",
        "reporting a failure is one thing, and taking the work back another",
        _virtual("images"),
        _WORK,
        "        if job.workers.withdraw(job) or queue[0] is not job:\n",
        "        if queue[0] is not job:\n",
    ),
    _bug(
        "of what was written in part, all is written again",
        "send says how much it has taken, and it is nearly always all of it",
        _virtual("a life, cut"),
        _CHANNEL,
        "        frame.rest = frame.rest[sent:]\n",
        "        frame.rest = frame.rest[sent:] if sent > 1 else frame.rest\n",
    ),
    _bug(
        "an end overtakes the response that waits for room",
        "what is small can be sent at once",
        _virtual("a slow reader"),
        _PEERS,
        "        if self.is_blocked:\n            self._wait(_Waiting(message,",
        "        if self.channel.wants_write:\n            self._wait(_Waiting(message,",
    ),
    _bug(
        "a connection is read until nothing is left, and the others wait",
        "what is there can be read at once",
        _virtual("a crowd"),
        _PEERS,
        "            if connection.read():\n                self._put(connection)\n",
        "            while connection.read():\n                pass\n",
    ),
    _bug(
        "a peer that reads is given up for having been slow before",
        "a timer that is not stopped",
        _virtual("it reads no more"),
        _PEERS,
        "            self._read_deadline.cancel()\n            self._read_deadline = None\n",
        "            self._read_deadline = None\n",
    ),
    _bug(
        "who connects again is read before it is known that it was gone",
        "two connections, two descriptors, and no order between them",
        _virtual("it calls back"),
        _PEERS,
        "        self._notice()\n        must_wait = bool(self._in_order[connection.uid])\n",
        "        must_wait = False\n",
    ),
    _bug(
        "work that a worker has left alone is not looked at again",
        "a wake-up that is lost: one of two is told, and it is the one that may not",
        _virtual("images"),
        _WORK,
        "            self._turns.put(job.lane, job)\n            self._changed.notify()\n",
        "            if not self._turns:\n                self._changed.notify()\n"
        "            self._turns.put(job.lane, job)\n",
    ),
    _bug(
        "the end is recorded when the release begins, and not when it is decided",
        "the work does it as well",
        _virtual("shared"),
        _SERVE,
        "            self._backend.record_ended(name)\n",
        "            self._loop.call_soon(self._backend.record_ended, name)\n",
    ),
    _bug(
        "half a frame is waited for for ever",
        "a timer that is not started",
        _virtual("in pieces"),
        _PEERS,
        "                self._time_frame()\n",
        "",
    ),
    _bug(
        "an operation that was asked for is done again when the next one is",
        "adding to a queue and beginning are the same when it is empty",
        _virtual("one after the other"),
        _WORK,
        "        if queue[0] is job:\n            self._begin(job)\n",
        "        self._begin(queue[0])\n",
    ),
    _bug(
        "a frame is refused as late whose rest has come and is not read",
        "found in a virtual world: nothing is read from a peer whose answers wait",
        _virtual("half a frame, and blocked"),
        _PEERS,
        "        if self.is_blocked:\n            self._frame_deadline = None\n        elif",
        "        if",
    ),
    _bug(
        "a consumer waits for the confirmation of an end as long as between two calls",
        "what survived the tests of before: a timer with another timer's length",
        _virtual("a consumer loops"),
        _EXCHANGE,
        "        is_redial = effect.timer is Timer.REDIAL\n",
        "        is_redial = effect.timer is not Timer.ANSWER\n",
    ),
    _bug(
        "the time for an answer runs on when the answer has come",
        "a timer that is not stopped",
        _virtual("a consumer loops"),
        _EXCHANGE,
        "        self.deadlines.pop(effect.timer, None)\n",
        "",
    ),
    # --- This node -----------------------------------------------------------------------------
    _bug(
        "an anchor that its forge did not announce lives on",
        "what survived the tests of before: a child that its parent was not told of",
        _in(
            "forge",
            "linux/test_forge.py",
            "test_anchor_that_a_dying_forge_did_not_announce_is_killed",
            is_linux=True,
        ),
        "linux/forge/client.py",
        "                    if found == token:\n",
        "                    if False:\n",
    ),
    _bug(
        "a path in /proc is believed without a second look at whose it is",
        "what survived the tests of before: a path that can change, on the oldest kernels",
        _in(
            "namespaces",
            "linux/test_namespaces.py",
            "test_a_path_in_proc_is_believed_only_of_an_anchor_that_lives_after_it",
            is_linux=True,
        ),
        "linux/namespaces.py",
        "    if not anchor.is_alive():\n        namespace.close()\n",
        "    if False:\n        namespace.close()\n",
    ),
    _bug(
        "a system call that a signal interrupts has failed",
        "what survived the tests of before: EINTR is an error",
        _in(
            "system calls",
            "linux/test_syscalls.py",
            "test_a_call_that_a_signal_interrupts_is_made_again",
        ),
        "linux/syscalls.py",
        "            if error.errno != EINTR:\n",
        "            if True:\n",
    ),
    _bug(
        "what was done first is undone first",
        "what survived the tests of before: the next try heals it, so that nothing is seen",
        _linux("TestBackend::test_the_steps_are_those_of_the_contract_in_its_order"),
        "linux/steps.py",
        "        for step in reversed(allocation.done):\n",
        "        for step in tuple(allocation.done):\n",
    ),
    _bug(
        "a cgroup that was not used yet is over",
        "populated 0 is what it begins with",
        _linux("TestBackend::test_an_unused_scope_is_not_over[linux]"),
        "linux/cgroups.py",
        "            return Use.NONE\n",
        "            return Use.OVER\n",
    ),
    _bug(
        "only what was seen running counts as use",
        "a process can come and go between two looks",
        _in(
            "cgroups",
            "linux/test_cgroups.py",
            "test_use_that_was_not_watched_is_still_known",
            is_linux=True,
        ),
        "linux/cgroups.py",
        "not (self._was_seen_populated or self.was_used()):",
        "not self._was_seen_populated:",
    ),
    _bug(
        "where the init is dead, memory is said to be short",
        "setns succeeds, and only then every fork fails with ENOMEM",
        _namespaces("test_dead_init_is_known_where_the_kernel_tells"),
        "linux/namespaces.py",
        "return error.errno == errno.ESRCH\n",
        "return False\n",
    ),
    _bug(
        "the loopback of a new network is down",
        "that is how Linux makes it",
        _forge("test_lo_is_up_and_alone"),
        "linux/forge/child.py",
        "request[:] = _IFREQ.pack(name, flags | _IFF_UP)",
        "request[:] = _IFREQ.pack(name, flags)",
    ),
    _bug(
        "an image is dropped when its first user leaves",
        "use is counted, or it is not",
        _mounts("test_the_hold_time_begins_with_the_last_user"),
        "linux/mounts.py",
        "        if not entry.users and not entry.borrowers and entry.free_since is None:",
        "        if not entry.borrowers and entry.free_since is None:",
    ),
    _bug(
        "set-uid programs of an image run with their owner's rights",
        "read-only sounds safe enough",
        _mounts("test_the_mount_is_read_only_nosuid_and_nodev"),
        "linux/mounts.py",
        "MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV\n",
        "MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV\n",
    ),
    _bug(
        "a state in the journal can go back",
        "the hand-over is recorded after the end, when both are slow",
        _journal("test_a_state_never_goes_back"),
        "linux/journal.py",
        "if STATES.index(state) < STATES.index(entry.state):",
        "if state not in STATES:",
    ),
    _bug(
        "a release forgets the name",
        "what is gone is gone",
        _journal("test_basic"),
        "linux/journal.py",
        "                _remembering(allocation_id, self._changes + 1),\n",
        "",
    ),
    _bug(
        "a flipped bit in the journal goes unnoticed",
        "SQLite checks its pages' structure, and not the values",
        _journal("test_a_value_that_was_damaged_is_not_believed"),
        "linux/journal.py",
        "        if checksum != _checksum(*row[:-1]):\n",
        "        if checksum is None:\n",
    ),
    _bug(
        "what the journal does not know is killed",
        "the journal is the list of what is alive",
        _recovery("test_no_row_releases_what_may_be_alive"),
        "linux/recovery.py",
        "        Verdict.UNKNOWN,\n        Action.ADOPT,\n",
        "        Verdict.DEAD,\n        Action.RELEASE,\n",
    ),
    _bug(
        "a state directory that was made anew gives power over what is alive",
        "the lock is a file in the state directory",
        _recovery("test_a_second_provider_has_no_power_over_the_first", is_linux=True),
        "linux/instance.py",
        "            if not _is_locked_now(directory, path, fcntl.LOCK_EX, holder):\n",
        "            if not _is_locked_now(directory, path, fcntl.LOCK_UN, holder):\n",
    ),
    _bug(
        "any user can keep the journal from being written",
        "the directory is private, or so one thinks; systemd makes it for all to enter",
        _threats(
            "test_what_is_tried_comes_to_what_the_chapter_says"
            "[keep the journal from being written, by a lock-stranger]"
        ),
        "linux/journal.py",
        "FILE_MODE: Final = 0o600\n",
        "FILE_MODE: Final = 0o644\n",
    ),
    _bug(
        "any user can keep a provider from starting",
        "to lock a directory it is enough to be able to read it",
        _threats(
            "test_what_is_tried_comes_to_what_the_chapter_says[lock the anchors' cgroup-stranger]"
        ),
        "linux/cgroups.py",
        "ANCHORS_MODE: Final = 0o700\n",
        "ANCHORS_MODE: Final = 0o755\n",
    ),
    _bug(
        "any user can have run take itself for the second",
        "to lock a directory it is enough to be able to read it",
        _threats(
            "test_a_user_who_locks_all_that_can_be_opened_of_a_scope_does_not_mislead_run",
        ),
        "linux/cli/run.py",
        'os.open(scope / "cgroup.kill", os.O_WRONLY)',
        "os.open(scope, os.O_RDONLY)",
    ),
    _bug(
        "an image that is exchanged for a link leads out of the root",
        "its path was looked at before the link was there",
        _hostile("test_an_image_that_changes_all_the_time_never_leads_out"),
        "linux/mounts.py",
        "    resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS\n",
        "    resolve = RESOLVE_NO_MAGICLINKS\n",
    ),
    _bug(
        "frames that are never whole are kept, however many",
        "each has a limit of its own",
        _hostile(
            "test_under_a_flood_others_are_served_memory_is_bounded_and_it_stops"
            "[frames that are never whole]"
        ),
        "transport/serve/peers.py",
        "        return self._others.unread.change(self.uid, change)\n",
        "        return self._others.unread.change(self.uid, change) or True\n",
    ),
    _bug(
        "what run started goes on when run is killed with its forge",
        "in self-service the forge ends the scope, and it is killed last, or so one thinks",
        _lifetime("test_by_self_service_a_run_that_is_killed_with_its_forge_takes_all_along"),
        "linux/cli/run.py",
        "            if options.tie and scope is not None:\n",
        "            if options.tie and scope is not None and not handoff.is_own:\n",
    ),
    _bug(
        "a forge that is slow to start is taken for one that hangs",
        "an anchor takes a millisecond; on a busy node a Python program takes seconds to start",
        _forge("test_forge_has_longer_to_start_than_to_make_an_anchor"),
        "linux/forge/client.py",
        "        ours.settimeout(START_TIMEOUT_S)\n",
        "        ours.settimeout(FORGE_TIMEOUT_S)\n",
    ),
    _bug(
        "a provider that was killed is taken for ready",
        "it had removed the file, if it had been stopped",
        _serve("test_readiness_of_a_killed_provider_is_withdrawn_before_the_next_one_serves"),
        "linux/cli/serve.py",
        "    readiness.clear()  # that of a provider that was killed\n",
        "",
    ),
    _bug(
        "who asks before it is ready is told that it is",
        "the socket is there from the start, and says what the file has",
        _serve("test_who_asks_before_it_is_ready_is_told_when_it_is"),
        "linux/cli/ready_socket.py",
        "                await self._is_ready.wait()\n",
        "",
    ),
    _bug(
        "nothing is audited",
        "the option is read, and its file opened",
        _audit("test_basic_a_life_is_told_from_the_hand_over_to_the_cleanup"),
        "linux/cli/serve.py",
        "        observers.insert(0, stack.enter_context(AuditFile(options.audit)))\n",
        "        stack.enter_context(AuditFile(options.audit))\n",
    ),
    _bug(
        "a request whose sender is interrupted is sent twice",
        "an exception of a signal's handler comes between a system call and the note of it",
        _interruption(),
        "linux/cli/consumer.py",
        "            handoff = consumer.obtain(request, cancel=cancel.fileno())\n",
        "            for number in wanted:\n"
        "                signal.signal(number, _raise)\n"
        "            signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)\n"
        "            handoff = consumer.obtain(request)\n",
        "linux/cli/consumer.py",
        "def failure_of(",
        "def _raise(number: int, _: object) -> None:\n"
        "    raise Interrupted(number)\n\n\n"
        "def failure_of(",
        "transport/request/exchange.py",
        "        if self.channel is not None and self.channel.wants_write:\n",
        "        if False:\n",
    ),
    # --- Guards --------------------------------------------------------------------------------
    *(Canary(name, GUARD, _strangers(*swept), (change,)) for name, swept, change in SWEPT),
    *(
        Canary(name, GUARD, Layer("guard", "tests", (test,), is_linux=True), (change,))
        for name, test, change in TESTED
    ),
)

BY_NAME: Final = {canary.name: canary for canary in CANARIES}
