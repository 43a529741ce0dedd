#include "wire.h"

#include <stdlib.h>
#include <string.h>

#include "json.h"

const char *const kind_names[KINDS] = {
    "NamespaceRequest", "NamespaceResponse",  "AllocationEnded", "SocketUnavailable",
    "CreationFailed",   "AllocationNotFound", "FdPassing",
};
const char *const type_names[3] = {"Pid", "Net", "Mount"};

static const char ERROR_NAME[] = "NamespaceError";

static const struct {
    unsigned fields, may_be_absent; /* the latter: a bit for each */
    const char *names[3];
} structs[KINDS] = {
    [NAMESPACE_REQUEST] = {3, 1 << 2, {"allocation_id", "namespaces", "uenv_image"}},
    [NAMESPACE_RESPONSE] = {3, 0, {"allocation_id", "fd_types", "uenv_mount_path"}},
    [ALLOCATION_ENDED] = {1, 0, {"allocation_id"}},
    [SOCKET_UNAVAILABLE] = {1, 0, {"reason"}},
    [CREATION_FAILED] = {1, 0, {"reason"}},
    [ALLOCATION_NOT_FOUND] = {1, 0, {"allocation_id"}},
    [FD_PASSING] = {1, 0, {"reason"}},
};

bool spans_equal(struct span a, struct span b)
{
    return a.size == b.size && (!a.size || !memcmp(a.at, b.at, a.size));
}

bool span_is(struct span a, const char *text)
{
    return spans_equal(a, (struct span){(const uint8_t *)text, strlen(text)});
}

bool messages_equal(const struct message *a, const struct message *b)
{
    return a->kind == b->kind && spans_equal(a->text, b->text) &&
           a->types_count == b->types_count && !memcmp(a->types, b->types, a->types_count) &&
           a->has_uenv == b->has_uenv && (!a->has_uenv || spans_equal(a->uenv, b->uenv));
}

/* --- MessagePack: one head at a time --- */

enum shape { NIL, SCALAR, BINARY, TEXT, ARRAY, MAP };

struct head {
    enum shape shape;
    struct span text;
    uint32_t count; /* elements of an array, entries of a map */
};

static bool is_utf8(struct span text)
{
    for (size_t i = 0; i < text.size;) {
        uint8_t lead = text.at[i++];
        if (lead < 0x80)
            continue;
        unsigned more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
        if (lead < 0xC2 || lead > 0xF4 || text.size - i < more)
            return false;
        /* The second byte has the borders: no overlong form, no surrogate, no more than 10FFFF. */
        uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (text.at[i] < low || text.at[i] > high)
            return false;
        for (i++; --more; i++)
            if ((text.at[i] & 0xC0) != 0x80)
                return false;
    }
    return true;
}

static bool take_bytes(struct span *in, size_t size, struct span *out)
{
    if (in->size < size)
        return false;
    *out = (struct span){in->at, size};
    in->at += size;
    in->size -= size;
    return true;
}

static bool take_number(struct span *in, size_t width, uint32_t *number)
{
    struct span bytes;
    if (!take_bytes(in, width, &bytes))
        return false;
    *number = 0;
    for (size_t i = 0; i < width; i++)
        *number = *number << 8 | bytes.at[i];
    return true;
}

static const char *take_content(struct span *in, struct head *head, enum shape shape, size_t width,
                                uint32_t count)
{
    head->shape = shape;
    if (width && !take_number(in, width, &count))
        return "truncated";
    head->count = count;
    if (shape == ARRAY || shape == MAP)
        return count > ELEMENTS_MAX ? "too-many" : NULL;
    if (!take_bytes(in, count, &head->text))
        return "truncated";
    return shape == TEXT && !is_utf8(head->text) ? "not-utf-8" : NULL;
}

static const char *take_head(struct span *in, struct head *head)
{
    uint32_t code;
    if (!take_number(in, 1, &code))
        return "truncated";
    if (code < 0x80 || code >= 0xE0)
        return take_content(in, head, SCALAR, 0, 0);
    if (code < 0xA0)
        return take_content(in, head, code < 0x90 ? MAP : ARRAY, 0, code & 0x0F);
    if (code < 0xC0)
        return take_content(in, head, TEXT, 0, code & 0x1F);
    switch (code) {
    case 0xC0: return take_content(in, head, NIL, 0, 0);
    case 0xC1: return "not-messagepack";
    case 0xC2: case 0xC3: return take_content(in, head, SCALAR, 0, 0);
    case 0xC4: case 0xC5: case 0xC6: return take_content(in, head, BINARY, 1u << (code - 0xC4), 0);
    case 0xCA: case 0xCE: case 0xD2: return take_content(in, head, SCALAR, 0, 4);
    case 0xCB: case 0xCF: case 0xD3: return take_content(in, head, SCALAR, 0, 8);
    case 0xCC: case 0xD0: return take_content(in, head, SCALAR, 0, 1);
    case 0xCD: case 0xD1: return take_content(in, head, SCALAR, 0, 2);
    case 0xD9: case 0xDA: case 0xDB: return take_content(in, head, TEXT, 1u << (code - 0xD9), 0);
    case 0xDC: case 0xDD: return take_content(in, head, ARRAY, code == 0xDC ? 2 : 4, 0);
    case 0xDE: case 0xDF: return take_content(in, head, MAP, code == 0xDE ? 2 : 4, 0);
    default: return "extension";
    }
}

/* --- What is refused whatever the message: looks at every value once, at most 3 deep --- */

static const char *walk(struct span *in, int depth)
{
    struct head head;
    const char *fault = take_head(in, &head);
    if (fault || (head.shape != ARRAY && head.shape != MAP))
        return fault;
    if (depth == NESTING_MAX)
        return "too-deep";
    struct span keys[ELEMENTS_MAX];
    for (uint32_t i = 0; i < head.count && !fault; i++) {
        if (head.shape == MAP) {
            struct head key;
            if ((fault = take_head(in, &key)))
                return fault;
            if (key.shape != TEXT)
                return "key-type";
            for (uint32_t j = 0; j < i; j++)
                if (spans_equal(keys[j], key.text))
                    return "duplicate-key";
            keys[i] = key.text;
        }
        fault = walk(in, depth + 1);
    }
    return fault;
}

/* --- Messages. From here on the body is known to be sound, so that heads can be taken blindly --- */

static struct head next(struct span *in)
{
    struct head head = {NIL, {NULL, 0}, 0};
    take_head(in, &head);
    return head;
}

static const char *take_sole_key(struct span *in, struct span *key)
{
    struct head head = next(in);
    if (head.shape != MAP)
        return "wrong-type";
    if (head.count != 1)
        return "entries";
    *key = next(in).text;
    return NULL;
}

static const char *find_fields(struct span in, enum kind kind, struct span found[3])
{
    unsigned fields = structs[kind].fields, seen = structs[kind].may_be_absent;
    struct head head = next(&in);
    if (head.shape != ARRAY && head.shape != MAP)
        return "wrong-type";
    if (head.shape == ARRAY && head.count != fields)
        return "field-count";
    for (uint32_t i = 0; i < head.count; i++) {
        unsigned field = i;
        if (head.shape == MAP) {
            struct span key = next(&in).text;
            for (field = 0; field < fields && !span_is(key, structs[kind].names[field]);)
                field++;
        }
        if (field < fields) {
            found[field] = in;
            seen |= 1u << field;
        }
        walk(&in, 0);
    }
    return seen == (1u << fields) - 1 ? NULL : "missing-field";
}

static const char *read_types(struct span in, struct message *message)
{
    struct head list = next(&in);
    if (list.shape != ARRAY)
        return "wrong-type";
    for (uint32_t i = 0; i < list.count; i++) {
        struct head element = next(&in);
        if (element.shape != TEXT)
            return "wrong-type";
        uint8_t type = 0;
        while (type < 3 && !span_is(element.text, type_names[type]))
            type++;
        if (type == 3)
            return "unknown-type";
        message->types[message->types_count++] = type;
    }
    return NULL;
}

static const char *read_fields(struct span in, struct message *message)
{
    struct span found[3] = {{NULL, 0}, {NULL, 0}, {NULL, 0}};
    const char *fault = find_fields(in, message->kind, found);
    if (fault)
        return fault;
    struct head text = next(&found[0]);
    if (text.shape != TEXT)
        return "wrong-type";
    message->text = text.text;
    if (structs[message->kind].fields == 1)
        return NULL;
    if ((fault = read_types(found[1], message)))
        return fault;
    struct head uenv = found[2].at ? next(&found[2]) : (struct head){NIL, {NULL, 0}, 0};
    message->has_uenv = uenv.shape == TEXT;
    message->uenv = uenv.text;
    return uenv.shape == TEXT || uenv.shape == NIL ? NULL : "wrong-type";
}

const char *message_read(struct span body, struct message *message)
{
    struct span rest = body, name;
    const char *fault = walk(&rest, 0);
    if (fault)
        return fault;
    if (rest.size)
        return "trailing";
    *message = (struct message){.kind = KINDS};
    if ((fault = take_sole_key(&body, &name)))
        return fault;
    bool is_error = span_is(name, ERROR_NAME);
    if (is_error && (fault = take_sole_key(&body, &name)))
        return fault;
    enum kind first = is_error ? SOCKET_UNAVAILABLE : NAMESPACE_REQUEST;
    enum kind after = is_error ? KINDS : SOCKET_UNAVAILABLE;
    for (enum kind kind = first; kind < after; kind++)
        if (span_is(name, kind_names[kind]))
            message->kind = kind;
    if (message->kind == KINDS)
        return is_error ? "unknown-error" : "unknown-message";
    return read_fields(body, message);
}

/* --- Writing --- */

static uint8_t *put_text(uint8_t *out, struct span text)
{
    if (text.size < 32) {
        *out++ = (uint8_t)(0xA0 | text.size);
    } else if (text.size < 256) {
        *out++ = 0xD9;
        *out++ = (uint8_t)text.size;
    } else {
        *out++ = 0xDA;
        *out++ = (uint8_t)(text.size >> 8);
        *out++ = (uint8_t)text.size;
    }
    if (text.size)
        memcpy(out, text.at, text.size);
    return out + text.size;
}

static uint8_t *put_name(uint8_t *out, const char *name)
{
    return put_text(out, (struct span){(const uint8_t *)name, strlen(name)});
}

static uint8_t *put_fields(uint8_t *out, const struct message *message)
{
    const char *const *names = structs[message->kind].names;
    *out++ = (uint8_t)(0x80 | structs[message->kind].fields);
    out = put_text(put_name(out, names[0]), message->text);
    if (structs[message->kind].fields == 1)
        return out;
    out = put_name(out, names[1]);
    if (message->types_count < 16) {
        *out++ = (uint8_t)(0x90 | message->types_count);
    } else {
        *out++ = 0xDC;
        *out++ = 0;
        *out++ = (uint8_t)message->types_count;
    }
    for (size_t i = 0; i < message->types_count; i++)
        out = put_name(out, type_names[message->types[i]]);
    out = put_name(out, names[2]);
    if (message->has_uenv)
        return put_text(out, message->uenv);
    *out++ = 0xC0;
    return out;
}

size_t frame_write(const struct message *message, uint8_t *frame)
{
    uint8_t *out = frame + HEADER_BYTES;
    *out++ = 0x81;
    if (message->kind >= SOCKET_UNAVAILABLE) {
        out = put_name(out, ERROR_NAME);
        *out++ = 0x81;
    }
    out = put_fields(put_name(out, kind_names[message->kind]), message);
    size_t body = (size_t)(out - frame) - HEADER_BYTES;
    for (int i = 0; i < HEADER_BYTES; i++)
        frame[i] = (uint8_t)(body >> (8 * (HEADER_BYTES - 1 - i)));
    return HEADER_BYTES + body;
}

/* --- Frames and descriptors --- */

void channel_feed(struct channel *channel, struct span bytes, unsigned descriptors, bool is_cut_off)
{
    if (channel->fault || !bytes.size)
        return;
    channel->bytes = realloc(channel->bytes, channel->size + bytes.size);
    if (!channel->bytes)
        give_up("no memory");
    memcpy(channel->bytes + channel->size, bytes.at, bytes.size);
    size_t first_byte = channel->size;
    channel->size += bytes.size;
    if (descriptors || is_cut_off)
        /* Two can wait: for the frame that this read ends, and for the one that it has begun. */
        channel->arrivals[channel->arrivals_count++] = (struct arrival){
            first_byte, channel->size - 1, channel->descriptors, descriptors, is_cut_off};
    channel->descriptors += descriptors;
}

static const char *fault_of_arrivals(const struct channel *channel, unsigned count)
{
    if (count && channel->is_provider)
        return "descriptors-refused";
    if (count > 1)
        return "descriptors-twice";
    return count && channel->arrivals[0].is_cut_off ? "descriptors-cut-off" : NULL;
}

static const char *take_frame(struct channel *channel, struct span body, struct delivery *delivery)
{
    size_t start = channel->taken, end = start + HEADER_BYTES + body.size;
    unsigned mine = 0;
    while (mine < channel->arrivals_count && channel->arrivals[mine].last_byte < end)
        mine++;
    const char *fault = fault_of_arrivals(channel, mine);
    if (fault)
        return fault;
    if (mine && channel->arrivals[0].first_byte > start)
        return "descriptors-late";
    if ((fault = message_read(body, &delivery->message)))
        return fault;
    const struct message *message = &delivery->message;
    size_t announced = message->kind == NAMESPACE_RESPONSE ? message->types_count : 0;
    delivery->first = mine ? channel->arrivals[0].first : 0;
    delivery->count = mine ? channel->arrivals[0].count : 0;
    if (delivery->count != announced)
        return "descriptors-count";
    channel->taken = end;
    channel->arrivals_count -= mine;
    if (mine)
        channel->arrivals[0] = channel->arrivals[1];
    return NULL;
}

bool channel_take(struct channel *channel, struct delivery *delivery)
{
    if (channel->fault || !channel->size)
        return false;
    struct span rest = {channel->bytes + channel->taken, channel->size - channel->taken};
    uint32_t length = 1;
    bool has_header = take_number(&rest, HEADER_BYTES, &length);
    if (!length || length > FRAME_BYTES_MAX) {
        channel->fault = length ? "length-over-limit" : "length-zero";
        return false;
    }
    if (!has_header || rest.size < length) {
        /* What can be refused now is: the peer might never send the rest. */
        channel->fault = fault_of_arrivals(channel, channel->arrivals_count);
        return false;
    }
    channel->fault = take_frame(channel, (struct span){rest.at, length}, delivery);
    return !channel->fault;
}

void channel_drop(struct channel *channel)
{
    free(channel->bytes);
    channel->bytes = NULL;
}

/* --- What may be asked, and what an answer means --- */

static bool has_control(struct span text)
{
    for (size_t i = 0; i < text.size; i++) {
        bool is_c1 = text.at[i] == 0xC2 && i + 1 < text.size && text.at[i + 1] < 0xA0;
        if (text.at[i] < 0x20 || text.at[i] == 0x7F || is_c1)
            return true;
    }
    return false;
}

const char *objection_to_id_size(struct span id)
{
    return id.size < 1 || id.size > 128 ? "id-size" : NULL;
}

static const char *objection_to_id(struct span id)
{
    if (objection_to_id_size(id))
        return "id-size";
    if (memchr(id.at, '/', id.size) || has_control(id))
        return "id-characters";
    bool is_kernels = id.size >= 7 && !memcmp(id.at, "cgroup.", 7);
    return span_is(id, ".") || span_is(id, "..") || is_kernels ? "id-reserved" : NULL;
}

static const char *objection_to_image(struct span image)
{
    if (image.size < 1 || image.size > 4096)
        return "image-size";
    if (has_control(image))
        return "image-characters";
    if (image.size >= 5 && !memcmp(image.at + image.size - 5, ".sqfs", 5))
        image.size -= 5;
    for (size_t i = 0, start = 0; i <= image.size; i++) {
        if (i < image.size && image.at[i] != '/')
            continue;
        struct span part = {image.at + start, i - start};
        if (!part.size || span_is(part, ".") || span_is(part, ".."))
            return "image-path";
        start = i + 1;
    }
    return NULL;
}

const char *objection(const struct message *request)
{
    const char *found = objection_to_id(request->text);
    unsigned seen = 0;
    for (size_t i = 0; i < request->types_count && !found; i++) {
        if (seen & 1u << request->types[i])
            found = "types-repeated";
        seen |= 1u << request->types[i];
    }
    if (found || !request->has_uenv)
        return found;
    return seen & 1u << 2 ? objection_to_image(request->uenv) : "image-without-mount";
}

const char *meaning(const struct message *request, const struct message *message)
{
    bool is_same = spans_equal(request->text, message->text);
    switch (message->kind) {
    case NAMESPACE_RESPONSE:
        is_same = is_same && request->types_count == message->types_count &&
                  !memcmp(request->types, message->types, request->types_count) &&
                  request->has_uenv == message->has_uenv;
        return is_same ? "ResponseReceived" : "ResponseMismatched";
    case ALLOCATION_ENDED: return is_same ? "EndAnnounced" : "FrameRejected";
    case SOCKET_UNAVAILABLE: return "ProviderUnavailable";
    case CREATION_FAILED: return "CreationRefused";
    case ALLOCATION_NOT_FOUND: return "NotFoundReceived";
    case FD_PASSING: return "PassingFailed";
    default: return "FrameRejected";
    }
}
