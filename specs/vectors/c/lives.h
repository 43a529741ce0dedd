/* What a provider and a consumer do next: two machines that take events and give effects. */
#ifndef LIVES_H
#define LIVES_H

#include "json.h"

enum { EFFECTS_MAX = 64 };

/* Effects as the vectors write them: one line of JSON each. */
struct effects {
    const char *lines[EFFECTS_MAX];
    bool is_push[EFFECTS_MAX]; /* an end that was not asked for: it may stand between any answers */
    int count;
};

struct consumer {
    const char *name, *request; /* the latter as JSON */
    enum { NOTHING, PENDING, HELD, REFUSAL, MAKES_OWN, OWN, FAILURE, WAITS, OVER } has;
    enum { DOWN, CALLING, UP } line;
    enum { SILENT, OWED, HEARD } notice; /* whether the provider must hear that it is over */
};

const char *consumer_state(const struct consumer *consumer);
const char *consumer_notice(const struct consumer *consumer);

/* Takes an event; false if it cannot come now, and nothing has changed. */
bool consumer_step(struct consumer *consumer, const struct json *event, struct effects *effects);

enum { PEERS_MAX = 8, ALLOCATIONS_MAX = 16, QUESTIONS_MAX = 64, REMEMBERED_MAX = 64 };

enum stage { UNKNOWN, REQUESTED, CREATED, HANDED_OFF, ENDED, RELEASED };

struct allocation {
    const char *name, *request, *response; /* the latter two as JSON */
    enum stage stage;
    long long uid; /* whose limits it counts for; -1: no user's */
    bool askers[PEERS_MAX], holders[PEERS_MAX];
    bool is_used, is_stuck, is_announced;
};

/* A message that has no answer yet, or whose answer waits for its turn. */
struct question {
    int connection;
    enum { FOR_NAMESPACES, FOR_END, PUSH, LAST_WORD } kind; /* after a last word it is closed */
    enum { UNREAD, ITS_ALLOCATIONS, DECIDED } fate;
    const struct json *message; /* the request, for one for namespaces */
    const char *name, *answer;
};

struct provider {
    struct {
        bool uids[2048];
        long long waiting, open_per_connection, open_per_uid, allocations_per_uid,
            connections_per_uid, remembered;
    } limits;
    bool is_ready, is_stopping;
    struct {
        bool is_there, is_closing;
        long long uid;
    } peers[PEERS_MAX];
    struct allocation allocations[ALLOCATIONS_MAX]; /* sorted by name */
    int allocations_count;
    struct question questions[QUESTIONS_MAX]; /* the oldest first */
    int questions_count;
    const char *remembered[REMEMBERED_MAX]; /* the oldest first */
    int remembered_count;
};

void provider_start(struct provider *provider, const struct json *limits,
                    const struct json *remembered);
const char *provider_state(const struct provider *provider, const char *name);
void provider_step(struct provider *provider, const struct json *event, struct effects *effects);

#endif
