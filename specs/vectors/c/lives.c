#include "lives.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "wire.h"

enum { LINE_BYTES_MAX = 2048 };

static __attribute__((format(printf, 1, 2))) const char *line(const char *format, ...)
{
    char text[LINE_BYTES_MAX];
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (size < 0 || size >= LINE_BYTES_MAX)
        give_up("an effect of %d bytes", size);
    return strcpy(json_room((size_t)size + 1), text);
}

static void emit(struct effects *effects, const char *effect)
{
    if (effects->count == EFFECTS_MAX)
        give_up("over %d effects of one event", EFFECTS_MAX);
    effects->lines[effects->count++] = effect;
}

static void time_it(struct effects *effects, bool before, bool after, bool is_over,
                    const char *timer, const char *name)
{
    if (before != after && !(before && is_over))
        emit(effects, line("{\"%s\":{\"timer\":\"%s\",\"allocation_id\":\"%s\"}}",
                           after ? "StartTimer" : "StopTimer", timer, name));
}

static bool is(const struct json *event, const char *name)
{
    return !strcmp(event->first->key, name);
}

static const char *text_in(const struct json *event, const char *key)
{
    return json_get(event->first, key)->text;
}

/* --- The consumer --- */

const char *consumer_state(const struct consumer *it)
{
    static const char *const names[] = {"idle",      "",       "held",   "refused", "serving_self",
                                        "self_held", "failed", "ending", "ended"};
    return it->has == PENDING ? it->line == UP ? "asking" : "connecting" : names[it->has];
}

const char *consumer_notice(const struct consumer *it)
{
    static const char *const owed[] = {"owed", "dialling", "told"};
    return it->notice == OWED ? owed[it->line] : it->notice == HEARD ? "heard" : "silent";
}

static bool consumer_hears(struct consumer *it, const struct json *event)
{
    bool pending = it->has == PENDING, owes = it->notice == OWED, holds = it->has == HELD;
    bool is_breach = is(event, "PassingFailed") || is(event, "FrameRejected");
    if (is_breach || is(event, "ConnectionLost")) {
        it->line = DOWN;
        if (pending) {
            it->has = MAKES_OWN;
            it->notice = OWED;
        }
        return true;
    }
    if (is(event, "EndAnnounced") ? !holds && !owes : !pending && !owes)
        return false;
    if (is(event, "ResponseReceived")) {
        if (pending)
            it->has = HELD;
    } else if (is(event, "ResponseMismatched")) {
        if (pending)
            *it = (struct consumer){it->name, it->request, MAKES_OWN, DOWN, OWED};
    } else if (is(event, "CreationRefused")) {
        if (pending)
            *it = (struct consumer){it->name, it->request, REFUSAL, DOWN, it->notice};
    } else if (is(event, "ProviderUnavailable")) {
        it->has = pending ? MAKES_OWN : it->has;
        it->line = DOWN;
    } else if (is(event, "NotFoundReceived") || is(event, "EndAnnounced")) {
        it->line = DOWN;
        it->notice = owes ? HEARD : it->notice;
        it->has = pending ? REFUSAL : holds || it->has == WAITS ? OVER : it->has;
    } else {
        give_up("no event of a consumer: %s", event->raw);
    }
    return true;
}

static bool consumer_moves(struct consumer *it, const struct json *event)
{
    bool pending = it->has == PENDING, owes = it->notice == OWED;
    if (is(event, "NamespacesWanted")) {
        if (it->has != NOTHING)
            return false;
        it->has = PENDING;
        it->line = CALLING;
    } else if (is(event, "Connected") || is(event, "ProviderUnreachable")) {
        if (it->line != CALLING)
            return false;
        it->line = is(event, "Connected") ? UP : DOWN;
        if (pending && it->line == DOWN)
            it->has = MAKES_OWN;
    } else if (is(event, "AnswerOverdue")) {
        if (!pending || it->line != UP)
            return false;
        it->has = MAKES_OWN;
        it->notice = OWED;
    } else if (is(event, "NoticeDue")) {
        if (!owes || it->line != DOWN)
            return false;
        it->line = CALLING;
    } else if (is(event, "NoticeOverdue")) {
        if (!owes || it->line != UP)
            return false;
        it->line = DOWN;
    } else if (is(event, "SelfServed") || is(event, "SelfServiceFailed")) {
        if (it->has != MAKES_OWN)
            return false;
        it->has = is(event, "SelfServed") ? OWN : FAILURE;
    } else if (is(event, "EndWanted")) {
        if (it->has != NOTHING && !pending && it->has != HELD && it->has != OWN)
            return false;
        if (it->has == OWN || (pending && it->line == CALLING)) {
            it->line = pending ? DOWN : it->line;
            it->has = OVER;
        } else {
            it->has = WAITS;
            it->notice = OWED;
        }
    } else {
        return it->line == UP && consumer_hears(it, event);
    }
    return true;
}

static void consumer_effects(const struct consumer *b, const struct consumer *a,
                             const struct json *event, struct effects *out)
{
    bool asked = b->has == PENDING && b->line == UP, asks = a->has == PENDING && a->line == UP;
    bool told = b->notice == OWED && b->line == UP, tells = a->notice == OWED && a->line == UP;
    bool owed = b->notice == OWED && b->line == DOWN, owes = a->notice == OWED && a->line == DOWN;
    bool became = a->has != b->has, is_mismatch = is(event, "ResponseMismatched");
    bool is_lost = is(event, "ConnectionLost"), is_late = is(event, "AnswerOverdue");
    /* To the provider. */
    if (is_mismatch || (is(event, "ResponseReceived") && !(became && a->has == HELD)))
        emit(out, "{\"DiscardDescriptors\":{}}");
    if (is(event, "FrameRejected") || (is_mismatch && asked))
        emit(out, "{\"SendFault\":{\"reason\":null}}");
    if (b->line != DOWN && a->line != b->line && a->line != UP && !is_lost &&
        !is(event, "ProviderUnreachable"))
        emit(out, "{\"CloseChannel\":{}}");
    if (a->line == CALLING && b->line != CALLING)
        emit(out, "{\"Connect\":{}}");
    if (asks && !asked)
        emit(out, line("{\"SendRequest\":{\"request\":%s}}", a->request));
    if (tells && !told)
        emit(out, line("{\"SendEnd\":{\"allocation_id\":\"%s\"}}", a->name));
    /* To the caller. */
    const char *error = "{\"FdPassing\":null}";
    if (is_lost || is_late || is(event, "ProviderUnreachable") || is(event, "ProviderUnavailable"))
        error = "{\"SocketUnavailable\":null}";
    else if (is(event, "CreationRefused") || is(event, "SelfServiceFailed"))
        error = "{\"CreationFailed\":null}";
    else if (is(event, "NotFoundReceived"))
        error = json_get(event->first, "error")->raw;
    if (became && a->has == MAKES_OWN) {
        emit(out, line("{\"ReportFallback\":{\"allocation_id\":\"%s\",\"error\":%s}}", a->name, error));
        emit(out, line("{\"ServeSelf\":{\"request\":%s}}", a->request));
    }
    if (became && (a->has == REFUSAL || a->has == FAILURE || is(event, "NotFoundReceived")))
        emit(out, line("{\"ReportRefusal\":{\"error\":%s}}", error));
    if (became && (a->has == HELD || a->has == OWN))
        emit(out, line("{\"DeliverDescriptors\":{\"response\":%s,\"is_degraded\":%s}}",
                       json_get(event->first, "response")->raw, a->has == OWN ? "true" : "false"));
    if (became && a->has == OVER && b->has == OWN)
        emit(out, line("{\"ReleaseOwn\":{\"allocation_id\":\"%s\"}}", a->name));
    if (became && a->has == OVER)
        emit(out, line("{\"ReportEnd\":{\"allocation_id\":\"%s\"}}", a->name));
    time_it(out, asked, asks, is_late, "answer", a->name);
    time_it(out, told, tells, is(event, "NoticeOverdue"), "notice", a->name);
    time_it(out, owed, owes, is(event, "NoticeDue"), "redial", a->name);
}

bool consumer_step(struct consumer *it, const struct json *event, struct effects *effects)
{
    struct consumer before = *it;
    if (!consumer_moves(it, event)) {
        *it = before;
        return false;
    }
    /* A notice owed without a line is sent by calling; later ones wait for the redial. */
    if (before.notice == SILENT && it->notice == OWED && it->line == DOWN)
        it->line = CALLING;
    consumer_effects(&before, it, event, effects);
    return true;
}

/* --- The provider: looking at it --- */

static struct allocation *find(const struct provider *it, const char *name)
{
    for (int i = 0; i < it->allocations_count; i++)
        if (!strcmp(it->allocations[i].name, name))
            return (struct allocation *)&it->allocations[i];
    return NULL;
}

static int index_in_memory(const struct provider *it, const char *name)
{
    int i = 0;
    while (i < it->remembered_count && strcmp(it->remembered[i], name))
        i++;
    return i;
}

static bool is_starting(const struct provider *it)
{
    return !it->is_ready && !it->is_stopping;
}

static bool is_alive(const struct allocation *a)
{
    return a && (a->stage == CREATED || a->stage == HANDED_OFF);
}

static bool has_any(const bool flags[PEERS_MAX])
{
    for (int i = 0; i < PEERS_MAX; i++)
        if (flags[i])
            return true;
    return false;
}

static bool claim_runs(const struct allocation *a)
{
    return is_alive(a) && !a->is_used && !has_any(a->askers);
}

static bool retry_runs(const struct allocation *a)
{
    return a && a->stage == ENDED && a->is_stuck;
}

static bool release_runs(const struct allocation *a)
{
    return a && a->stage == ENDED && !a->is_announced;
}

static int unread(const struct provider *it)
{
    int count = 0;
    for (int i = 0; i < it->questions_count; i++)
        count += it->questions[i].fate == UNREAD;
    return count;
}

static bool readiness_runs(const struct provider *it)
{
    return is_starting(it) && unread(it);
}

const char *provider_state(const struct provider *it, const char *name)
{
    static const char *const names[] = {"unknown",    "requested", "created",
                                        "handed_off", "ended",     "released"};
    const struct allocation *a = find(it, name);
    if (a)
        return names[a->stage];
    return names[index_in_memory(it, name) < it->remembered_count ? RELEASED : UNKNOWN];
}

/* --- The provider: small moves --- */

static void forget_name(struct provider *it, int index)
{
    it->remembered_count--;
    for (int i = index; i < it->remembered_count; i++)
        it->remembered[i] = it->remembered[i + 1];
}

static void remember(struct provider *it, const char *name)
{
    int index = index_in_memory(it, name);
    if (index < it->remembered_count)
        forget_name(it, index);
    if (it->remembered_count == REMEMBERED_MAX)
        give_up("over %d names to remember", REMEMBERED_MAX);
    it->remembered[it->remembered_count++] = name;
    while (it->remembered_count > it->limits.remembered)
        forget_name(it, 0);
}

static struct allocation *enter(struct provider *it, const char *name, const struct json *request,
                                enum stage stage, long long uid)
{
    if (it->allocations_count == ALLOCATIONS_MAX)
        give_up("over %d allocations", ALLOCATIONS_MAX);
    int place = it->allocations_count++;
    for (; place && strcmp(it->allocations[place - 1].name, name) > 0; place--)
        it->allocations[place] = it->allocations[place - 1];
    it->allocations[place] = (struct allocation){
        .name = name, .request = request->raw, .stage = stage, .uid = uid};
    int index = index_in_memory(it, name);
    if (index < it->remembered_count)
        forget_name(it, index);
    return &it->allocations[place];
}

static void leave(struct provider *it, struct allocation *a)
{
    it->allocations_count--;
    for (int i = (int)(a - it->allocations); i < it->allocations_count; i++)
        it->allocations[i] = it->allocations[i + 1];
}

static const char *refusal(int connection, const char *error)
{
    return line("{\"Refuse\":{\"connection\":%d,\"error\":{\"%s\":null}}}", connection, error);
}

static const char *end_of(int connection, const char *name)
{
    return line("{\"AnnounceEnd\":{\"connection\":%d,\"allocation_id\":\"%s\"}}", connection, name);
}

static void decide(struct question *question, const char *answer)
{
    question->fate = DECIDED;
    question->answer = answer;
}

static struct question *ask(struct provider *it, int place, struct question question)
{
    if (it->questions_count == QUESTIONS_MAX)
        give_up("over %d questions", QUESTIONS_MAX);
    for (int i = it->questions_count++; i > place; i--)
        it->questions[i] = it->questions[i - 1];
    it->questions[place] = question;
    return &it->questions[place];
}

static void say_last(struct provider *it, int place, int connection, const char *error)
{
    ask(it, place, (struct question){.connection = connection, .kind = LAST_WORD, .fate = DECIDED,
                                     .answer = refusal(connection, error)});
}

static void turn_away(struct provider *it)
{
    for (int i = 0; i < it->questions_count; i++)
        if (it->questions[i].fate == UNREAD)
            decide(&it->questions[i], refusal(it->questions[i].connection, "SocketUnavailable"));
}

/* It has ended for all: released, or not released in time. */
static void announce(struct provider *it, const char *name, const bool holders[PEERS_MAX])
{
    bool is_answered[PEERS_MAX] = {false};
    for (int i = 0; i < it->questions_count; i++) {
        struct question *q = &it->questions[i];
        if (q->fate != ITS_ALLOCATIONS || strcmp(q->name, name))
            continue;
        bool is_end = q->kind == FOR_END;
        decide(q, is_end ? end_of(q->connection, name) : refusal(q->connection, "CreationFailed"));
        is_answered[q->connection] = is_answered[q->connection] || is_end;
    }
    for (int c = 0; c < PEERS_MAX; c++)
        if (holders[c] && !is_answered[c] && !it->peers[c].is_closing)
            ask(it, 0, (struct question){.connection = c, .kind = PUSH, .fate = DECIDED,
                                         .answer = end_of(c, name)});
}

/* --- The provider: what has happened --- */

static void hang_up(struct provider *it, int connection)
{
    it->peers[connection].is_there = it->peers[connection].is_closing = false;
    for (int i = 0; i < it->allocations_count; i++)
        it->allocations[i].askers[connection] = it->allocations[i].holders[connection] = false;
    int kept = 0;
    for (int i = 0; i < it->questions_count; i++)
        if (it->questions[i].connection != connection)
            it->questions[kept++] = it->questions[i];
    it->questions_count = kept;
}

static void open_up(struct provider *it, int connection, long long uid)
{
    long long others = 0;
    for (int i = 0; i < PEERS_MAX; i++)
        others += it->peers[i].is_there && it->peers[i].uid == uid;
    it->peers[connection].is_there = true;
    it->peers[connection].uid = uid;
    if (uid < 0 || uid >= (long long)sizeof it->limits.uids || !it->limits.uids[uid])
        say_last(it, 0, connection, "SocketUnavailable");
    else if (others >= it->limits.connections_per_uid)
        say_last(it, 0, connection, "CreationFailed");
}

static void hear(struct provider *it, int connection, const struct json *event)
{
    bool is_request = is(event, "RequestReceived");
    long long mine = 0, users = 0, uid = it->peers[connection].uid;
    for (int i = 0; i < it->questions_count; i++) {
        mine += it->questions[i].connection == connection;
        users += it->peers[it->questions[i].connection].uid == uid;
    }
    const char *error = NULL;
    bool is_over = mine >= it->limits.open_per_connection || users >= it->limits.open_per_uid;
    if (is_request && is_over)
        error = "CreationFailed";
    else if (it->is_stopping && (is_request || !it->is_ready))
        error = "SocketUnavailable";
    else if (is_starting(it) && unread(it) >= it->limits.waiting)
        error = "SocketUnavailable";
    const struct json *message = is_request ? json_get(event->first, "request") : NULL;
    const struct json *named = is_request ? message : event->first;
    struct question question = {
        .connection = connection,
        .kind = is_request ? FOR_NAMESPACES : FOR_END,
        .message = message,
        .name = json_get(named, "allocation_id")->text,
    };
    struct question *asked = ask(it, it->questions_count, question);
    if (error)
        decide(asked, refusal(connection, error));
    if (mine + 1 > 2 * it->limits.open_per_connection)
        say_last(it, 0, connection, "FdPassing");
}

static void allocation_moves(struct provider *it, struct allocation *a, const struct json *event)
{
    if (is(event, "NamespacesCreated")) {
        if (a->stage == REQUESTED) {
            a->stage = CREATED;
            a->response = json_get(event->first, "response")->raw;
        }
    } else if (is(event, "NamespacesNotCreated") || is(event, "ReleaseRequested") ||
               is(event, "ClaimExpired") || is(event, "ScopeEmptied") || is(event, "InitDied")) {
        a->stage = ENDED;
    } else if (is(event, "ScopePopulated")) {
        a->is_used = true;
    } else if (is(event, "ResponseSent")) {
        int connection = (int)json_get(event->first, "connection")->number;
        a->stage = a->stage == CREATED ? HANDED_OFF : a->stage;
        a->holders[connection] = it->peers[connection].is_there;
    } else if (is(event, "RetryDue")) {
        a->is_stuck = false;
    } else if (is(event, "ReleaseDelayed")) {
        a->is_stuck = true;
    } else if (is(event, "ReleaseOverdue")) {
        struct allocation was = *a;
        a->is_announced = true;
        memset(a->holders, 0, sizeof a->holders);
        announce(it, was.name, was.holders);
    } else if (is(event, "NamespacesReleased")) {
        struct allocation was = *a;
        leave(it, a);
        remember(it, was.name);
        announce(it, was.name, was.holders);
    } else if (!is(event, "ResponseNotSent")) {
        give_up("no event of a provider: %s", event->raw);
    }
}

static void provider_moves(struct provider *it, const struct json *event)
{
    bool is_peers = is(event, "ConnectionOpened") || is(event, "ConnectionLost") ||
                    is(event, "RequestReceived") || is(event, "EndReceived") ||
                    is(event, "FrameRejected");
    if (is_peers) {
        int connection = (int)json_get(event->first, "connection")->number;
        if (connection < 0 || connection >= PEERS_MAX)
            give_up("over %d connections", PEERS_MAX);
        if (is(event, "ConnectionOpened"))
            open_up(it, connection, json_get(event->first, "uid")->number);
        else if (is(event, "ConnectionLost"))
            hang_up(it, connection);
        else if (is(event, "FrameRejected"))
            say_last(it, it->questions_count, connection, "FdPassing");
        else
            hear(it, connection, event);
    } else if (is(event, "ProviderReady")) {
        it->is_ready = true;
    } else if (is(event, "ProviderStopping") || is(event, "ReadinessOverdue")) {
        turn_away(it);
        it->is_stopping = it->is_stopping || is(event, "ProviderStopping");
    } else if (is(event, "RemainsFound")) {
        enter(it, text_in(event, "allocation_id"), json_get(event->first, "request"), ENDED, -1);
    } else if (is(event, "CreatedAdopted") || is(event, "HandedOffAdopted")) {
        enum stage stage = is(event, "CreatedAdopted") ? CREATED : HANDED_OFF;
        const char *name = text_in(event, "allocation_id");
        enter(it, name, json_get(event->first, "request"), stage, -1)->response =
            json_get(event->first, "response")->raw;
    } else {
        struct allocation *a = find(it, text_in(event, "allocation_id"));
        if (!a)
            give_up("no such allocation: %s", event->raw);
        allocation_moves(it, a, event);
    }
}

/* --- The provider: messages, when they can be looked at --- */

static bool is_granted(const struct json *request)
{
    struct message message = {.kind = NAMESPACE_REQUEST};
    const struct json *name = json_get(request, "allocation_id");
    const struct json *uenv = json_get(request, "uenv_image");
    message.text = (struct span){(const uint8_t *)name->text, name->size};
    message.has_uenv = uenv->kind == JSON_TEXT;
    message.uenv = (struct span){(const uint8_t *)uenv->text, uenv->size};
    const struct json *type = json_get(request, "namespaces")->first;
    for (; type && message.types_count < ELEMENTS_MAX; type = type->next)
        for (uint8_t i = 0; i < 3; i++)
            if (json_is(type, type_names[i]))
                message.types[message.types_count++] = i;
    return !objection(&message);
}

static void read_end(struct provider *it, struct question *q)
{
    /* An end takes back the requests that its sender sent before it, and that were not looked at yet. */
    for (struct question *earlier = it->questions; earlier < q; earlier++)
        if (earlier->kind == FOR_NAMESPACES && earlier->fate == UNREAD &&
            earlier->connection == q->connection && !strcmp(earlier->name, q->name))
            decide(earlier, refusal(q->connection, "CreationFailed"));
    struct allocation *a = find(it, q->name);
    if (a && !a->is_announced) {
        a->stage = ENDED;
        q->fate = ITS_ALLOCATIONS;
    } else if (a || index_in_memory(it, q->name) < it->remembered_count) {
        decide(q, end_of(q->connection, q->name));
    } else {
        decide(q, line("{\"Refuse\":{\"connection\":%d,\"error\":{\"AllocationNotFound\":\"%s\"}}}",
                       q->connection, q->name));
    }
}

static void read_request(struct provider *it, struct question *q)
{
    struct allocation *a = find(it, q->name);
    long long uid = it->peers[q->connection].uid, live = 0;
    for (int i = 0; i < it->allocations_count; i++)
        live += it->allocations[i].uid == uid;
    if (is_granted(q->message) && !a && live < it->limits.allocations_per_uid)
        a = enter(it, q->name, q->message, REQUESTED, uid);
    if (!is_granted(q->message) || !a || (a->stage == ENDED && a->is_announced)) {
        decide(q, refusal(q->connection, "CreationFailed"));
    } else if (a->stage != ENDED && strcmp(a->request, q->message->raw)) {
        decide(q, refusal(q->connection, "CreationFailed"));
    } else if (a->stage != ENDED) {
        a->askers[q->connection] = true;
        q->fate = ITS_ALLOCATIONS;
    } /* else it is early: it waits for the release */
}

static void read_question(struct provider *it, struct question *q)
{
    if (q->fate != UNREAD || is_starting(it))
        return;
    if (q->kind == FOR_END)
        read_end(it, q);
    else
        read_request(it, q);
}

/* --- The provider: what is to be done about it --- */

static void tell_backend(const struct provider *b, const struct provider *a,
                         const struct json *event, struct effects *out)
{
    for (int i = 0; i < a->allocations_count; i++) {
        const struct allocation *now = &a->allocations[i], *was = find(b, now->name);
        if (!was && now->stage == REQUESTED)
            emit(out, line("{\"CreateNamespaces\":{\"request\":%s}}", now->request));
        if (is_alive(now) && !is_alive(was))
            emit(out, line("{\"Watch\":{\"allocation_id\":\"%s\"}}", now->name));
        if (was && was->stage == CREATED && now->stage == HANDED_OFF)
            emit(out, line("{\"RecordHandoff\":{\"allocation_id\":\"%s\"}}", now->name));
        bool was_tried = was && was->stage == ENDED && !was->is_stuck;
        if (now->stage == ENDED && !now->is_stuck && !was_tried)
            emit(out, line("{\"ReleaseNamespaces\":{\"allocation_id\":\"%s\"}}", now->name));
    }
    time_it(out, readiness_runs(b), readiness_runs(a), event && is(event, "ReadinessOverdue"),
            "readiness", "");
    for (int i = 0; i < a->allocations_count + b->allocations_count; i++) {
        bool is_new = i < a->allocations_count;
        const char *name = is_new ? a->allocations[i].name
                                  : b->allocations[i - a->allocations_count].name;
        const struct allocation *was = find(b, name), *now = find(a, name);
        if (!is_new && now)
            continue;
        time_it(out, claim_runs(was), claim_runs(now), event && is(event, "ClaimExpired"), "claim",
                name);
        time_it(out, release_runs(was), release_runs(now), event && is(event, "ReleaseOverdue"),
                "release", name);
        time_it(out, retry_runs(was), retry_runs(now), event && is(event, "RetryDue"), "retry",
                name);
    }
}

static const char *answer_to(const struct provider *it, const struct question *q)
{
    if (q->fate == DECIDED)
        return q->answer;
    if (q->fate == UNREAD || q->kind != FOR_NAMESPACES)
        return NULL;
    const struct allocation *a = find(it, q->name);
    if (!is_alive(a))
        return NULL;
    return line("{\"HandOver\":{\"connection\":%d,\"response\":%s}}", q->connection, a->response);
}

/* Gives every connection its answers, up to the first that is not decided. */
static bool speak(struct provider *it, struct effects *out)
{
    bool waits[PEERS_MAX] = {false};
    int kept = 0, count = it->questions_count;
    for (int i = 0; i < count; i++) {
        struct question q = it->questions[i];
        const char *answer = answer_to(it, &q);
        if (!answer || waits[q.connection] || it->peers[q.connection].is_closing) {
            waits[q.connection] = true;
            it->questions[kept++] = q;
            continue;
        }
        out->is_push[out->count] = q.kind == PUSH;
        emit(out, answer);
        if (q.kind == LAST_WORD) {
            emit(out, line("{\"CloseConnection\":{\"connection\":%d}}", q.connection));
            it->peers[q.connection].is_closing = true;
        }
    }
    it->questions_count = kept;
    return kept < count;
}

void provider_step(struct provider *it, const struct json *event, struct effects *effects)
{
    static struct provider before;
    before = *it;
    provider_moves(it, event);
    tell_backend(&before, it, event, effects);
    speak(it, effects);
    for (int i = 0; i < it->questions_count;) {
        before = *it;
        read_question(it, &it->questions[i]);
        tell_backend(&before, it, NULL, effects);
        i = speak(it, effects) ? 0 : i + 1;
    }
}

static long long limit(const struct json *limits, const char *name, long long usual)
{
    for (const struct json *value = limits->first; value; value = value->next)
        if (!strcmp(value->key, name))
            return value->number;
    return usual;
}

void provider_start(struct provider *it, const struct json *limits, const struct json *remembered)
{
    memset(it, 0, sizeof *it);
    it->limits.waiting = limit(limits, "waiting", 128);
    it->limits.open_per_connection = limit(limits, "open_per_connection", 64);
    it->limits.open_per_uid = limit(limits, "open_per_uid", 1024);
    it->limits.allocations_per_uid = limit(limits, "allocations_per_uid", 4096);
    it->limits.connections_per_uid = limit(limits, "connections_per_uid", 4096);
    it->limits.remembered = limit(limits, "remembered", 1024);
    it->limits.uids[0] = true;
    for (const struct json *value = limits->first; value; value = value->next)
        if (!strcmp(value->key, "allowed_uids"))
            for (const struct json *uid = value->first; uid; uid = uid->next)
                if (uid->number >= 0 && uid->number < (long long)sizeof it->limits.uids)
                    it->limits.uids[uid->number] = true;
    for (const struct json *name = remembered->first; name; name = name->next)
        remember(it, name->text);
}
