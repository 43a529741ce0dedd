/* The provider's rules in Promela, for SPIN: allocations and connections in an open environment.
 *
 * Written from the text of the book alone (chapters 1 to 10), without a look at any Python.
 *
 * -DALLOCATIONS= -DCONNECTIONS= (2 each at most)  -DMESSAGES= (unanswered messages of a connection, and hand-overs to
 * it that are not reported). `spin -o1 -o2 -a`: without -o1 -o2 states that differ in what is not read are merged.
 *
 * Events, each possible whenever its guard in chapter 3 allows it:
 *   peers       ConnectionOpened, ConnectionLost, RequestReceived (one of two different requests for a name),
 *               EndReceived, FrameRejected
 *   backend     NamespacesCreated, NamespacesNotCreated, NamespacesReleased, ReleaseDelayed
 *   driver      ResponseSent, ResponseNotSent: one for each HandOver, before the loss of its connection, and before
 *               ReleaseOverdue and NamespacesReleased of its allocation
 *   timers      ClaimExpired, ReleaseOverdue, RetryDue
 *   node        ScopePopulated, ScopeEmptied, InitDied
 *   operator    ReleaseRequested
 *   -DREADINESS adds ProviderReady, ReadinessOverdue, ProviderStopping, CreatedAdopted, HandedOffAdopted,
 *               RemainsFound: the provider starts, and may be stopped
 *   -DCRASH     (with -DREADINESS) adds the death of the provider at any moment, and the next one
 *   -DLIMITS    adds two users, of whom each has one allocation at most, and RequestOverLimit, ConnectionFlooded:
 *               a connection may have one unanswered message
 * Left out: PeerRefused, QueueFull, names that are forgotten, a request that is refused at sight, bytes, descriptors,
 * images, the reasons of refusals, the consumer's kernel, time.
 *
 * A state is: of each allocation its state, its request, whether it was used, who asked, who was handed it, which
 * hand-overs are not reported, what the backend is doing, which timers run, who waits for its release in which
 * order, whether its name is remembered, whose it is; of each connection whether it is open, and its unanswered
 * messages in order, each with what it says and what is owed for it; of the provider whether it is ready and what it
 * holds back in which order; what the journal says after a crash. Of what has ended neither the request nor the use
 * nor the askers count. `sets` (what the node has) and `holds` (what a consumer was handed, and not told the end of)
 * are for the assertions: they follow from the rest, and no rule reads them.
 *
 * BREAK_X, with the name of a property for the X, is one deliberate error each, which the assertion or formula of that name has to find.
 *
 * Changed after it was compared with the kernel, each time in favour of a text that had been overlooked or is not in
 * the chapters:
 *   - A hand-over is reported before ReleaseOverdue as well, and not only before the release: a rule for drivers in
 *     the docstring of HandOver, which no chapter had (now END-24). Without it a holder can be told twice, or not while it drains.
 *   - The readiness timer stops with the last held message: else one that comes later waits for less than LIFE-14 says.
 *   - What a closed connection has sent before is still processed until its loss is reported (PEER-6).
 *   - What is adopted is what chapter 7's table adopts: a journal's entry is never found to be of nothing at all.
 *   - A name that is alive again is not remembered as well: nothing asked, so this counts fewer states only.
 */
#ifndef MESSAGES
#define MESSAGES 2
#endif
#define M MESSAGES
#define PAIRS (ALLOCATIONS * CONNECTIONS)
#define SLOTS (CONNECTIONS * MESSAGES)

#define UNKNOWN 0       /* states of an allocation; a released one is unknown and remembered */
#define REQUESTED 1
#define CREATED 2
#define HANDED_OFF 3
#define ENDED 4

#define ABSENT 0        /* states of a connection */
#define READING 1
#define READ_CLOSED 2          /* a frame was not readable: nothing is read any more */
#define CLOSED 3        /* by the provider; its loss is not reported yet */

#define FIRST 1         /* what a message says: one request, another request for the same name, an end */
#define OTHER 2
#define END 3
#define NOISE 4

#define HELD 1          /* what is owed for a message */
#define OPEN 2
#define DEFERRED 3
#define GRANTED 4       /* from here on its answer is known, and waits for its turn */
#define FAILED 5        /* CreationFailed */
#define NOT_FOUND 6     /* AllocationNotFound */
#define UNAVAILABLE 7   /* SocketUnavailable */
#define CONFIRMED 8
#define UNREADABLE 9    /* FdPassing, and the connection is closed */

#define STARTING 1      /* states of the service */
#define READY 0
#define STOPPING 2
#define ABORTED 3

byte state[ALLOCATIONS], wanted[ALLOCATIONS];
bit used[ALLOCATIONS], remembered[ALLOCATIONS];
bit creating[ALLOCATIONS], releasing[ALLOCATIONS];              /* the backend owes a report */
bit claim[ALLOCATIONS], deadline[ALLOCATIONS], retry[ALLOCATIONS];  /* timers */
bit asks[PAIRS], handed[PAIRS];
bit holds[PAIRS];                                               /* at the consumer; no rule reads it */
byte unreported[PAIRS];
byte sets[ALLOCATIONS];
chan line[ALLOCATIONS] = [SLOTS] of { byte };                   /* connections of deferred requests, in order */

byte link[CONNECTIONS];
byte says[SLOTS], about[SLOTS], owed[SLOTS];

#ifdef LIVENESS
bit turn[CONNECTIONS];                                          /* changes with each answer, and each loss */
#endif

#ifdef READINESS
byte service = STARTING;
bit readiness;                                                  /* timer */
chan held = [SLOTS] of { byte };
#define SERVICE service
#else
#define SERVICE READY
#endif
#ifdef CRASH
byte left[ALLOCATIONS], leftwanted[ALLOCATIONS];                 /* what the journal says: a state, or UNKNOWN */
#ifdef GHOST
bit over[ALLOCATIONS];                                          /* its end was announced; no rule reads it */
#endif
#endif
#ifdef LIMITS
byte owner[ALLOCATIONS];                                        /* the user whose allocation it is, plus 1 */
#define USER(c) (c % 2)
#define HAS_ONE(c) (owner[0] == USER(c) + 1 || owner[ALLOCATIONS - 1] == USER(c) + 1)
#ifdef BREAK_PEER4
#define OVER_LIMIT(c) false
#else
#define OVER_LIMIT(c) HAS_ONE(c)
#endif
#else
#define OVER_LIMIT(c) false
#endif

hidden byte PEER4, PEER6, S03, S04, S05, S10, S11, S12, S13, S14, S15, S16, S19, S24, WIRE14;  /* never set: they name assertions */
hidden byte i, j, k, n, p, q, w, x, y, z, slot;                    /* scratch; hidden: no part of a state */
hidden int before[ALLOCATIONS];

#define PAIR(a, c) ((a) * CONNECTIONS + (c))
#define ALIVE(a) (state[a] == CREATED || state[a] == HANDED_OFF)
#define LISTENS(c) (link[c] == READING || link[c] == READ_CLOSED)
#define UNREPORTED(c) (unreported[PAIR(0, c)] + (ALLOCATIONS > 1 -> unreported[PAIR(ALLOCATIONS - 1, c)] : 0))
#define HAS_ROOM(c) (UNREPORTED(c) < M && !owed[c * M + M - 1 - UNREPORTED(c)])
#define REPORTED(a) (!unreported[PAIR(a, 0)] && !unreported[PAIR(a, CONNECTIONS - 1)])
#define ANNOUNCED(a) (state[a] == ENDED && !deadline[a])

/* --- what of an allocation must stay as it was (S05, S11) --- */

#define DIGEST(a) (state[a] + 8 * wanted[a] + 32 * used[a] + 64 * creating[a] + 128 * releasing[a] + \
                   256 * claim[a] + 512 * deadline[a] + 1024 * retry[a] + 2048 * remembered[a] + 4096 * sets[a])

inline remember_all() {
    for (z : 0 .. ALLOCATIONS - 1) { before[z] = DIGEST(z) }
}

inline check_others(a) {
    for (z : 0 .. ALLOCATIONS - 1) { assert(S05 || (z == a || before[z] == DIGEST(z))) }
}

/* --- messages --- */

inline count(c) {   /* n: unanswered messages */
    n = 0;
    do
    :: n < M && owed[c * M + n] -> n++
    :: else -> break
    od
}

inline drop(c, at) {
    for (q : at .. M - 2) {
        says[c * M + q] = says[c * M + q + 1];
        about[c * M + q] = about[c * M + q + 1];
        owed[c * M + q] = owed[c * M + q + 1]
    }
    says[c * M + M - 1] = 0; about[c * M + M - 1] = 0; owed[c * M + M - 1] = 0
}

inline leave(a, c) {    /* the deferred requests of a connection do not wait for the release any more */
    w = len(line[a]);
    for (q : 1 .. w) {
        line[a]?x;
        if
        :: x != c -> line[a]!x
        :: else
        fi
    }
}

inline close(c) {   /* by the provider: it is no live connection any more, and nothing is answered */
    link[c] = CLOSED;
    for (z : 0 .. ALLOCATIONS - 1) {
#ifndef BREAK_S16
        handed[PAIR(z, c)] = 0;
#endif
        holds[PAIR(z, c)] = 0
    }
}

inline answer(c) {  /* TurnCame, as long as the answer of the first message is known (WIRE-14) */
    do
    :: p = 0;
#ifdef BREAK_WIRE14
       do
       :: p < M - 1 && owed[c * M + p] && owed[c * M + p] < GRANTED -> p++
       :: else -> break
       od;
#endif
       if
       :: owed[c * M + p] < GRANTED || link[c] == CLOSED -> break
       :: else
       fi;
       assert(WIRE14 || p == 0);
       slot = c * M + p;
       if
       :: owed[slot] == GRANTED ->
          assert(S04 || ALIVE(about[slot]));
          unreported[PAIR(about[slot], c)]++
       :: owed[slot] == UNREADABLE -> close(c)
       :: else
       fi;
       drop(c, p);
#ifdef LIVENESS
       turn[c] = 1 - turn[c]
#endif
    od
}

inline answer_all() {
    for (y : 0 .. CONNECTIONS - 1) { answer(y) }
}

/* --- an allocation --- */

inline order_creation(a) {
    creating[a] = 1;
    sets[a]++;
    assert(S10 || sets[a] == 1)
}

inline order_release(a) {
    assert(S13 || (state[a] == ENDED && !releasing[a] && sets[a]));
    releasing[a] = 1
}

inline check_claim(a) {
    x = 0;
    for (q : 0 .. CONNECTIONS - 1) { x = x + asks[PAIR(a, q)] }
    if
    :: ALIVE(a) && !used[a] && x == 0 -> claim[a] = 1
    :: else
    fi
}

inline end_of(a) {
    assert(S14 || state[a] != ENDED);
    state[a] = ENDED;
    wanted[a] = 0; used[a] = 0; claim[a] = 0; deadline[a] = 1;
    for (q : 0 .. CONNECTIONS - 1) { asks[PAIR(a, q)] = 0 }
#ifndef BREAK_S04
    for (q : 0 .. SLOTS - 1) {
        if
        :: owed[q] == GRANTED && about[q] == a -> owed[q] = OPEN
        :: else
        fi
    }
#endif
    order_release(a)
}

/* AnswerEnd, PushEnd, FailAskers; x says for a connection whether it is answered */
inline announce(a, with_deferred) {
    for (p : 0 .. CONNECTIONS - 1) {
        x = 0;
        for (q : p * M .. p * M + M - 1) {
            if
            :: owed[q] == OPEN && about[q] == a && says[q] == END -> owed[q] = CONFIRMED; x = 1
            :: owed[q] == OPEN && about[q] == a && says[q] != END -> owed[q] = FAILED
#ifndef BREAK_L01
            :: owed[q] == DEFERRED && about[q] == a && with_deferred -> owed[q] = FAILED
#endif
            :: else
            fi
        }
        if
        :: x -> holds[PAIR(a, p)] = 0
        :: handed[PAIR(a, p)] && !x ->
           assert(S15 || (LISTENS(p) && holds[PAIR(a, p)]));
           holds[PAIR(a, p)] = 0
        :: else
        fi;
        assert(S15 || !holds[PAIR(a, p)]);
#ifndef BREAK_S15
        handed[PAIR(a, p)] = 0
#endif
    }
#ifndef BREAK_L01
    if
    :: with_deferred ->
       do
       :: line[a]?x
       :: empty(line[a]) -> break
       od
    :: else
    fi
#endif
#ifdef GHOST
    ; over[a] = 1
#endif
}

inline judge(c, at) {   /* MessageDispatched */
    assert(S19 || SERVICE != STARTING);
    j = c * M + at;
    k = about[j];
    remember_all();
    if
#ifdef READINESS
    :: service == STOPPING && says[j] != END -> owed[j] = UNAVAILABLE
#endif
    :: says[j] == END ->
       if
       :: state[k] == UNKNOWN && !remembered[k] -> owed[j] = NOT_FOUND
       :: (state[k] == UNKNOWN && remembered[k]) || ANNOUNCED(k) ->
          owed[j] = CONFIRMED; handed[PAIR(k, c)] = 0; holds[PAIR(k, c)] = 0
       :: state[k] == ENDED && deadline[k] ->
          owed[j] = OPEN;
          for (q : c * M .. j) {                                /* END-17 */
              if
              :: owed[q] == DEFERRED && about[q] == k -> owed[q] = FAILED
              :: else
              fi
          }
          leave(k, c);
#ifdef BREAK_S14
          end_of(k)
#endif
       :: else -> owed[j] = OPEN; end_of(k)
       fi
    :: says[j] != END && state[k] == UNKNOWN && !OVER_LIMIT(c) ->
       owed[j] = OPEN;
       state[k] = REQUESTED; remembered[k] = 0; wanted[k] = says[j]; asks[PAIR(k, c)] = 1;
#ifdef GHOST
       over[k] = 0;
#endif
#ifdef LIMITS
       assert(PEER4 || !HAS_ONE(c));
       owner[k] = USER(c) + 1;
#endif
       order_creation(k)
    :: says[j] != END && state[k] == UNKNOWN && OVER_LIMIT(c) -> owed[j] = FAILED
    :: says[j] != END && state[k] == ENDED && deadline[k] -> owed[j] = DEFERRED; line[k]!c
    :: says[j] != END && ANNOUNCED(k) -> owed[j] = FAILED
    :: says[j] != END && state[k] != UNKNOWN && state[k] != ENDED && wanted[k] != says[j] ->
       owed[j] = FAILED;
#ifdef BREAK_S11
       wanted[k] = says[j];
#endif
       assert(S11 || before[k] == DIGEST(k))
    :: else ->
       asks[PAIR(k, c)] = 1;
       claim[k] = 0;
       owed[j] = (ALIVE(k) -> GRANTED : OPEN);
#ifdef BREAK_S10
       if
       :: ALIVE(k) -> order_creation(k)
       :: else
       fi
#endif
    fi;
#ifdef BREAK_S05
    if
    :: says[j] == END -> used[ALLOCATIONS - 1 - k] = 1
    :: else
    fi;
#endif
    check_others(k)
}

inline arrive(c, a, what) {
    says[c * M + n] = what; about[c * M + n] = a; i = n;
    if
#ifdef LIMITS
#ifndef BREAK_PEER6
    :: n >= 2 -> says[c * M + n] = 0; about[c * M + n] = 0; close(c)    /* ConnectionFlooded */
#endif
    :: n >= 1 && what != END -> owed[c * M + n] = FAILED       /* RequestOverLimit */
#endif
#ifdef READINESS
#ifndef BREAK_S19
    :: service == STARTING -> owed[c * M + n] = HELD; held!c;
#ifndef BREAK_L08
       readiness = 1
#endif
#endif
    :: service == ABORTED || (service == STOPPING && what != END) -> owed[c * M + n] = UNAVAILABLE
#endif
    :: else -> owed[c * M + n] = OPEN; judge(c, i)
    fi;
    answer_all();
#ifdef LIMITS
    assert(PEER6 || (M < 3 || !owed[c * M + 2]))
#endif
}

/* --- what follows a release --- */

inline forget(a) {
    assert(S12 || sets[a] == 1);
    sets[a]--;
    announce(a, false);
    state[a] = UNKNOWN; remembered[a] = 1; releasing[a] = 0; deadline[a] = 0;
#ifdef LIMITS
    owner[a] = 0;
#endif
    do
    :: nempty(line[a]) ->
       line[a]?y;
       i = 0;
       do
       :: owed[y * M + i] == DEFERRED && about[y * M + i] == a -> break
       :: else -> i++
       od;
       judge(y, i)
    :: empty(line[a]) -> break
    od;
    answer_all()
}

inline lose(c) {    /* its messages are dropped */
    close(c);
    link[c] = ABSENT;
    for (z : 0 .. ALLOCATIONS - 1) { leave(z, c) }
#ifdef READINESS
    w = len(held);
    for (q : 1 .. w) {
        held?x;
        if
        :: x != c -> held!x
        :: else
        fi
    }
    if
    :: len(held) == 0 -> readiness = 0
    :: else
    fi;
#endif
    for (q : c * M .. c * M + M - 1) { says[q] = 0; about[q] = 0; owed[q] = 0 }
#ifdef LIVENESS
    turn[c] = 1 - turn[c];
#endif
    for (p : 0 .. ALLOCATIONS - 1) {
        unreported[PAIR(p, c)] = 0;
        if
        :: asks[PAIR(p, c)] -> asks[PAIR(p, c)] = 0; check_claim(p)
        :: else
        fi
    }
}

#ifdef READINESS
inline judge_held() {
    do
    :: nempty(held) ->
       held?y;
       i = 0;
       do
       :: owed[y * M + i] == HELD -> break
       :: else -> i++
       od;
       judge(y, i);
       answer(y)
    :: empty(held) -> break
    od
}

inline refuse(what) {   /* every message that is held, or deferred, is answered with SocketUnavailable */
    do
    :: held?x
    :: empty(held) -> break
    od;
    for (p : 0 .. ALLOCATIONS - 1) {
        do
        :: line[p]?x
        :: empty(line[p]) -> break
        od
    }
    for (p : 0 .. SLOTS - 1) {
        if
        :: owed[p] == what -> owed[p] = UNAVAILABLE
        :: else
        fi
    }
    readiness = 0;
    answer_all()
}

inline adopt(a, as, what) {
    state[a] = as; remembered[a] = 0; wanted[a] = what; claim[a] = 1;
    sets[a] = 1;
#ifdef GHOST
    assert(S24 || !over[a]);
#endif
#ifdef CRASH
    left[a] = UNKNOWN; leftwanted[a] = 0
#endif
}

inline find_remains(a) {
    state[a] = CREATED; remembered[a] = 0;
    sets[a] = 1;
    end_of(a);
#ifdef CRASH
    left[a] = UNKNOWN; leftwanted[a] = 0
#endif
}
#endif

#ifdef CRASH
#define LEFT(a) left[a]
inline crash() {
    for (y : 0 .. ALLOCATIONS - 1) {
        if
        :: state[y] != UNKNOWN -> left[y] = state[y]; leftwanted[y] = wanted[y]
        :: else
        fi;
#ifdef BREAK_S24
        if
        :: left[y] == ENDED -> left[y] = HANDED_OFF; leftwanted[y] = FIRST
        :: else
        fi;
#endif
        state[y] = UNKNOWN; wanted[y] = 0; used[y] = 0; creating[y] = 0; releasing[y] = 0;
        claim[y] = 0; deadline[y] = 0; retry[y] = 0
    }
    for (y : 0 .. CONNECTIONS - 1) { lose(y) }
    service = STARTING; readiness = 0
}
#else
#define LEFT(a) UNKNOWN
#endif

#ifdef DUMP
/* One line for each state: the sets of states can be compared, not only their numbers. */
inline print_state() {
    printf("STATE");
    for (z : 0 .. ALLOCATIONS - 1) {
        printf(" %d%d%d%d%d%d%d%d%d", state[z], wanted[z], used[z], remembered[z], creating[z], releasing[z],
               claim[z], deadline[z], retry[z]);
#ifdef LIMITS
        printf("%d", owner[z]);
#endif
#ifdef CRASH
        printf("%d%d", left[z], leftwanted[z]);
#endif
        printf(":");
        for (q : 0 .. CONNECTIONS - 1) { printf("%d%d%d", asks[PAIR(z, q)], handed[PAIR(z, q)], unreported[PAIR(z, q)]) }
        printf(":");
        w = len(line[z]);
        for (q : 1 .. w) { line[z]?x; printf("%d", x); line[z]!x }
    }
    for (z : 0 .. CONNECTIONS - 1) {
        printf(" %d:", link[z]);
        for (q : z * M .. z * M + M - 1) { printf("%d%d%d", says[q], about[q], owed[q]) }
    }
#ifdef READINESS
    printf(" %d%d:", service, readiness);
    w = len(held);
    for (q : 1 .. w) { held?x; printf("%d", x); held!x }
#endif
    printf("\n")
}
#else
#define print_state() skip
#endif

inline done() {
    for (z : 0 .. ALLOCATIONS - 1) {
        assert(S03 || S12 || (sets[z] == (state[z] != UNKNOWN || LEFT(z) != UNKNOWN)))
    }
    print_state()
}

#ifdef LIVENESS
#define MAY_IDLE :: x = 0       /* what the process does need not happen */
#else
#define MAY_IDLE
#endif

/* --- the environment. One process for each thing that can be late, so that weak fairness (-f) is about it --- */

active [ALLOCATIONS] proctype creation() {
    byte a = _pid % ALLOCATIONS;
end: do
    :: d_step { creating[a] ->                                  /* NamespacesCreated */
           creating[a] = 0;
           if
           :: state[a] == REQUESTED ->
              state[a] = CREATED;
              for (q : 0 .. SLOTS - 1) {
                  if
                  :: owed[q] == OPEN && about[q] == a -> owed[q] = GRANTED
                  :: else
                  fi
              }
#ifndef BREAK_END1
              check_claim(a);
#endif
              answer_all()
           :: else
           fi;
           done() }
    :: d_step { creating[a] ->                                  /* NamespacesNotCreated */
           creating[a] = 0;
           if
#ifdef BREAK_S03
           :: state[a] == REQUESTED -> state[a] = UNKNOWN; wanted[a] = 0;
              for (q : 0 .. CONNECTIONS - 1) { asks[PAIR(a, q)] = 0 }
#endif
           :: state[a] == REQUESTED -> end_of(a)
           :: else
           fi;
           done() }
    od
}

active [ALLOCATIONS] proctype release() {
    byte a = _pid % ALLOCATIONS;
end: do
    :: d_step { releasing[a] && !creating[a] && REPORTED(a) -> forget(a); done() }  /* NamespacesReleased */
#ifndef ON_TIME
    :: d_step { releasing[a] && !creating[a] ->                 /* ReleaseDelayed */
           releasing[a] = 0;
#ifdef BREAK_S12
           sets[a]--;
#endif
#ifndef BREAK_L02
           retry[a] = 1;
#endif
           done() }
#endif
    od
}

active [ALLOCATIONS] proctype retrying() {
    byte a = _pid % ALLOCATIONS;
end: do
    :: d_step { retry[a] ->                                     /* RetryDue */
           retry[a] = 0;
           order_release(a);
           done() }
    od
}

active [ALLOCATIONS] proctype draining() {
    byte a = _pid % ALLOCATIONS;
end: do
    :: d_step { deadline[a] && REPORTED(a) ->                   /* ReleaseOverdue */
           deadline[a] = 0;
#ifndef BREAK_L05
           announce(a, true);
#endif
           answer_all(); done() }
    od
}

active [ALLOCATIONS] proctype claiming() {
    byte a = _pid % ALLOCATIONS;
end: do
    :: d_step { claim[a] ->                                     /* ClaimExpired */
#ifdef BREAK_S13
           order_release(a);
#else
           end_of(a);
#endif
           done() }
    od
}

active [ALLOCATIONS] proctype node() {
    byte a = _pid % ALLOCATIONS;
end: do
    :: d_step { ALIVE(a) && !used[a] -> used[a] = 1; claim[a] = 0; done() }     /* ScopePopulated */
    :: d_step { ALIVE(a) -> end_of(a); done() }                    /* ScopeEmptied, InitDied, ReleaseRequested */
    :: d_step { state[a] == REQUESTED -> end_of(a); done() }       /* ReleaseRequested */
    MAY_IDLE
    od
}

active [PAIRS] proctype driver() {
    byte a = _pid % ALLOCATIONS;
    byte c = (_pid / ALLOCATIONS) % CONNECTIONS;
end: do
    :: d_step { unreported[PAIR(a, c)] ->                       /* ResponseSent */
           unreported[PAIR(a, c)]--;
           if
           :: LISTENS(c) -> handed[PAIR(a, c)] = 1; holds[PAIR(a, c)] = 1
           :: else
           fi;
           if
           :: state[a] == CREATED -> state[a] = HANDED_OFF
           :: else
           fi;
           done() }
    :: d_step { unreported[PAIR(a, c)] -> unreported[PAIR(a, c)]--; done() }    /* ResponseNotSent */
    od
}

active [PAIRS] proctype talk() {
    byte a = _pid % ALLOCATIONS;
    byte c = (_pid / ALLOCATIONS) % CONNECTIONS;
end: do
    :: d_step { link[c] == READING && HAS_ROOM(c) -> count(c); arrive(c, a, FIRST); done() }
    :: d_step { link[c] == READING && HAS_ROOM(c) -> count(c); arrive(c, a, OTHER); done() }
    :: d_step { link[c] == READING && HAS_ROOM(c) -> count(c); arrive(c, a, END); done() }
    MAY_IDLE
    od
}

active [CONNECTIONS] proctype peer() {
    byte c = _pid % CONNECTIONS;
end: do
    :: d_step { link[c] == ABSENT ->                            /* ConnectionOpened */
           link[c] = READING;
           for (q : 0 .. ALLOCATIONS - 1) { assert(S16 || (!handed[PAIR(q, c)] && !asks[PAIR(q, c)])) }
           done() }
    :: d_step { link[c] != ABSENT -> lose(c); done() }          /* ConnectionLost */
    :: d_step { link[c] == READING && HAS_ROOM(c) ->            /* FrameRejected */
           count(c);
           says[c * M + n] = NOISE; owed[c * M + n] = UNREADABLE; link[c] = READ_CLOSED;
           answer(c); done() }
    MAY_IDLE
    od
}

#ifdef READINESS
#ifdef CRASH
#define MAY_ADOPT(a, as) (service == STARTING && left[a] == as)
#else
#define MAY_ADOPT(a, as) (service == STARTING && state[a] == UNKNOWN && !remembered[a])
#endif
#ifdef BREAK_L06
#define UNDONE(a) (left[a] != ENDED)
#else
#define UNDONE(a) true
#endif
#define ADOPTED (LEFT(0) == UNKNOWN && LEFT(ALLOCATIONS - 1) == UNKNOWN)

active proctype becoming_ready() {
end: do
    :: d_step { service == STARTING && ADOPTED ->               /* ProviderReady */
           service = READY; readiness = 0; judge_held(); answer_all(); done() }
    MAY_IDLE
    od
}

active proctype waiting_long() {
end: do
    :: d_step { readiness -> refuse(HELD); done() }             /* ReadinessOverdue */
    od
}

active proctype stopping() {
end: do
    :: d_step { service == STARTING -> service = ABORTED; refuse(HELD); done() }        /* ProviderStopping */
    :: d_step { service == READY -> service = STOPPING; refuse(DEFERRED); done() }
#ifdef CRASH
    :: d_step { true -> crash(); done() }
#endif
    MAY_IDLE
    od
}

active [ALLOCATIONS] proctype adoption() {
    byte a = _pid % ALLOCATIONS;
end: do
#ifdef CRASH
    :: d_step { MAY_ADOPT(a, CREATED) -> adopt(a, CREATED, leftwanted[a]); done() }
    :: d_step { MAY_ADOPT(a, REQUESTED) -> adopt(a, CREATED, leftwanted[a]); done() }
    :: d_step { MAY_ADOPT(a, HANDED_OFF) -> adopt(a, HANDED_OFF, leftwanted[a]); done() }
    :: d_step { service == STARTING && left[a] && UNDONE(a) -> find_remains(a); done() }    /* dead, or has ended */
#else
    :: d_step { MAY_ADOPT(a, CREATED) -> adopt(a, CREATED, FIRST); done() }
    :: d_step { MAY_ADOPT(a, CREATED) -> adopt(a, CREATED, OTHER); done() }
    :: d_step { MAY_ADOPT(a, HANDED_OFF) -> adopt(a, HANDED_OFF, FIRST); done() }
    :: d_step { MAY_ADOPT(a, HANDED_OFF) -> adopt(a, HANDED_OFF, OTHER); done() }
    :: d_step { MAY_ADOPT(a, ENDED) -> find_remains(a); done() }
#endif
    od
}
#endif

#ifdef LIVENESS
/* Under weak fairness (-f): each backend's report, each timer and each report of the driver comes in the end. That a
 * release is not delayed for ever is said where it is needed. */
#define STUCK(c, t) (owed[c * M] != 0 && turn[c] == t)
ltl L01 { !(<>[] STUCK(0, 0)) && !(<>[] STUCK(0, 1)) }
ltl L02 { (<>[] (retry[0] == 0)) -> [] (state[0] == ENDED -> <> (state[0] != ENDED)) }
ltl L05 { [] ((handed[0] && state[0] == ENDED) -> <> !handed[0]) }
#define UNCLAIMED (ALIVE(0) && !used[0] && !asks[0])
#ifdef CRASH
ltl L06 { [] ((left[0] && service == STARTING) -> <> (!left[0] || service != STARTING)) }
#endif
#ifdef READINESS
#define ANY_HELD (len(held) > 0)
ltl L08 { [] (ANY_HELD -> <> !ANY_HELD) }
#endif
ltl END1 { [] (UNCLAIMED -> <> !UNCLAIMED) }
#endif
