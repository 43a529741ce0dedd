/* Frames, messages and descriptors: one way to write what the vectors are about. */
#ifndef WIRE_H
#define WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FRAME_BYTES_MAX = 65536, HEADER_BYTES = 4, ELEMENTS_MAX = 64, NESTING_MAX = 3 };

struct span {
    const uint8_t *at;
    size_t size;
};

enum kind {
    NAMESPACE_REQUEST,
    NAMESPACE_RESPONSE,
    ALLOCATION_ENDED,
    SOCKET_UNAVAILABLE,
    CREATION_FAILED,
    ALLOCATION_NOT_FOUND,
    FD_PASSING,
    KINDS
};

struct message {
    enum kind kind;
    struct span text; /* allocation_id, or the reason */
    uint8_t types[ELEMENTS_MAX];
    size_t types_count;
    bool has_uenv;
    struct span uenv; /* uenv_image, or uenv_mount_path */
};

extern const char *const kind_names[KINDS];
extern const char *const type_names[3];

bool span_is(struct span a, const char *text);
bool spans_equal(struct span a, struct span b);
bool messages_equal(const struct message *a, const struct message *b);

/* Reads a body; its texts are lent from there. Returns NULL, or what is wrong. */
const char *message_read(struct span body, struct message *message);

/* Writes a whole frame, which must have room for the longest; returns its size. */
size_t frame_write(const struct message *message, uint8_t *frame);

/* Says why no provider can grant a request, or NULL. */
const char *objection(const struct message *request);
const char *objection_to_id_size(struct span id);

/* Names the event that a message is to a consumer that has asked. */
const char *meaning(const struct message *request, const struct message *message);

/* Descriptors that came with a read. */
struct arrival {
    size_t first_byte, last_byte; /* of the read, counted from the channel's first byte */
    unsigned first, count;        /* the descriptors' numbers */
    bool is_cut_off;
};

struct channel {
    bool is_provider;
    const char *fault; /* why nothing more can be received */
    uint8_t *bytes;    /* all that came; a real one would forget what it has read */
    size_t size, taken;
    unsigned descriptors;
    struct arrival arrivals[2];
    unsigned arrivals_count;
};

struct delivery {
    struct message message;
    unsigned first, count; /* the descriptors' numbers */
};

/* Takes in what a recvmsg returned. */
void channel_feed(struct channel *channel, struct span bytes, unsigned descriptors, bool is_cut_off);

/* Gives the next message, if there is one; else there may be a fault. */
bool channel_take(struct channel *channel, struct delivery *delivery);

void channel_drop(struct channel *channel);

#endif
