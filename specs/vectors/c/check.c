/*
 * Runs every golden vector: check DIRECTORY
 *
 * Opens every file that the manifests name and runs every case; a folder it cannot run, a file that
 * no manifest names and a count that differs are failures, too. Prints a line for each family and
 * one for each case that fails. Exit status: 0 all passed, 1 something failed, 2 could not run.
 */
#define _POSIX_C_SOURCE 200809L

#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "lives.h"
#include "wire.h"

static const char *case_id;
static int failures;

static __attribute__((format(printf, 1, 2))) void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("FAILED %s: ", case_id);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
    failures++;
}

/* --- From JSON --- */

static struct span bytes_of(const struct json *text)
{
    if (text->kind != JSON_TEXT || text->size % 2)
        give_up("%s: no hex: %.80s", case_id, text->raw);
    uint8_t *bytes = json_room(text->size / 2 + 1);
    for (size_t i = 0; i < text->size; i++) {
        static const char digits[] = "0123456789abcdef";
        const char *digit = text->text[i] ? strchr(digits, text->text[i]) : NULL;
        if (!digit)
            give_up("%s: no hex: %.80s", case_id, text->raw);
        bytes[i / 2] = (uint8_t)(bytes[i / 2] << 4 | (digit - digits));
    }
    return (struct span){bytes, text->size / 2};
}

static struct span span_of(const struct json *text)
{
    if (text->kind != JSON_TEXT)
        give_up("%s: no text: %.80s", case_id, text->raw);
    return (struct span){(const uint8_t *)text->text, text->size};
}

static struct message message_of(const struct json *document)
{
    struct message message = {.kind = KINDS};
    const struct json *content = document->first;
    if (!strcmp(content->key, "NamespaceError"))
        content = content->first;
    for (enum kind kind = 0; kind < KINDS; kind++)
        if (!strcmp(content->key, kind_names[kind]))
            message.kind = kind;
    if (message.kind == KINDS)
        give_up("%s: no message: %.80s", case_id, document->raw);
    const struct json *field = content->first;
    message.text = span_of(field);
    if (!(field = field->next))
        return message;
    for (const struct json *type = field->first; type; type = type->next)
        for (uint8_t i = 0; i < 3; i++)
            if (json_is(type, type_names[i]) && message.types_count < ELEMENTS_MAX)
                message.types[message.types_count++] = i;
    field = field->next;
    message.has_uenv = field->kind == JSON_TEXT;
    if (message.has_uenv)
        message.uenv = span_of(field);
    return message;
}

static bool is_among(const struct json *texts, const char *text)
{
    for (const struct json *one = texts->first; one; one = one->next)
        if (json_is(one, text))
            return true;
    return false;
}

/* --- One function for each family --- */

static void check_reading(struct span frame, const struct message *expected)
{
    struct channel channel = {.is_provider = true};
    struct delivery delivery;
    channel_feed(&channel, frame, 0, false);
    /* Without descriptors a response is no delivery: then only the body is read. */
    if (expected->kind == NAMESPACE_RESPONSE) {
        struct span body = {frame.at + HEADER_BYTES, frame.size - HEADER_BYTES};
        const char *fault = message_read(body, &delivery.message);
        if (fault || !messages_equal(&delivery.message, expected))
            fail("read as %s", fault ? fault : "another message");
    } else if (!channel_take(&channel, &delivery)) {
        fail("read as %s", channel.fault ? channel.fault : "not whole");
    } else if (!messages_equal(&delivery.message, expected) || channel.taken != frame.size) {
        fail("read as another message");
    }
    channel_drop(&channel);
}

static void run_frames(const struct json *it)
{
    static uint8_t written[HEADER_BYTES + FRAME_BYTES_MAX];
    struct message message = message_of(json_get(it, "message"));
    struct span frame = bytes_of(json_get(it, "frame"));
    check_reading(frame, &message);
    if (!spans_equal((struct span){written, frame_write(&message, written)}, frame))
        fail("written otherwise");
}

static void run_accepted(const struct json *it)
{
    struct message message = message_of(json_get(it, "message"));
    check_reading(bytes_of(json_get(it, "frame")), &message);
}

static void run_invalid(const struct json *it)
{
    struct channel channel = {.is_provider = false};
    struct delivery delivery;
    channel_feed(&channel, bytes_of(json_get(it, "frame")), 0, false);
    if (channel_take(&channel, &delivery) || !channel.fault)
        fail("not refused");
    else if (!is_among(json_get(it, "faults"), channel.fault))
        fail("refused as %s", channel.fault);
    channel_drop(&channel);
}

static void run_segments(const struct json *it)
{
    struct channel channel = {.is_provider = true};
    struct delivery delivery;
    const struct json *whole = json_get(it, "whole")->first, *refused = json_get(it, "refused");
    const struct json *expected = json_get(it, "messages")->first;
    const struct json *read = json_get(it, "reads")->first;
    long long out = 0;
    for (int index = 0; read && whole; index++, read = read->next, whole = whole->next) {
        channel_feed(&channel, bytes_of(read), 0, false);
        for (; channel_take(&channel, &delivery); out++) {
            struct message message = {.kind = KINDS};
            if (expected) {
                message = message_of(expected);
                expected = expected->next;
            }
            if (!messages_equal(&delivery.message, &message))
                fail("message %lld is another", out);
        }
        if (out != whole->number)
            fail("%lld messages after read %d", out, index);
        bool is_refused = refused->kind == JSON_NUMBER && index >= refused->number;
        if (is_refused != (channel.fault != NULL))
            fail("after read %d: %s", index, channel.fault ? channel.fault : "not refused");
    }
    if (read || whole || expected)
        fail("not all of it was used");
    size_t pending = channel.fault ? 0 : channel.size - channel.taken;
    if (pending != (size_t)json_get(it, "pending")->number)
        fail("%zu bytes pending", pending);
    channel_drop(&channel);
}

static void check_delivery(const struct delivery *delivery, const struct json *expected, int index)
{
    if (!expected) {
        fail("a delivery too many");
        return;
    }
    struct message message = message_of(json_get(expected, "message"));
    const struct json *number = json_get(expected, "descriptors")->first;
    unsigned count = 0;
    for (; number; number = number->next, count++)
        if (number->number != delivery->first + count)
            fail("descriptor %lld with another frame", number->number);
    if (!messages_equal(&delivery->message, &message) || count != delivery->count)
        fail("another delivery");
    if (json_get(expected, "after")->number != index)
        fail("delivered after read %d", index);
}

static void run_descriptors(const struct json *it)
{
    struct channel channel = {.is_provider = json_is(json_get(it, "side"), "provider")};
    struct delivery delivery;
    const struct json *expected = json_get(it, "deliveries")->first;
    const struct json *refused = json_get(it, "refused");
    int index = 0;
    for (const struct json *read = json_get(it, "reads")->first; read; read = read->next, index++) {
        unsigned descriptors = (unsigned)json_get(read, "descriptors")->number;
        bool is_cut_off = json_get(read, "cut_off")->kind == JSON_TRUE;
        channel_feed(&channel, bytes_of(json_get(read, "bytes")), descriptors, is_cut_off);
        while (channel_take(&channel, &delivery)) {
            check_delivery(&delivery, expected, index);
            expected = expected ? expected->next : NULL;
        }
        bool must = refused->kind == JSON_MAP && index >= json_get(refused, "after")->number;
        if (must != (channel.fault != NULL))
            fail("after read %d: %s", index, channel.fault ? channel.fault : "not refused");
    }
    if (expected)
        fail("a delivery is missing");
    if (channel.fault && refused->kind == JSON_MAP &&
        !is_among(json_get(refused, "faults"), channel.fault))
        fail("refused as %s", channel.fault);
    channel_drop(&channel);
}

static void run_requests(const struct json *it)
{
    struct message message = message_of(json_get(it, "message"));
    const char *answer, *reason = NULL;
    if (message.kind == NAMESPACE_REQUEST) {
        reason = objection(&message);
        answer = reason ? "CreationFailed" : "NamespaceResponse";
    } else if (message.kind == ALLOCATION_ENDED) {
        reason = objection_to_id_size(message.text);
        answer = reason ? "FdPassing" : "AllocationNotFound";
        reason = reason ? reason : "end-of-unknown";
    } else {
        answer = "FdPassing";
        reason = "not-for-a-provider";
    }
    const struct json *expected = json_get(it, "objection");
    if (!json_is(json_get(it, "answer"), answer))
        fail("answered with %s", answer);
    if (reason ? !json_is(expected, reason) : expected->kind != JSON_NULL)
        fail("objection: %s", reason ? reason : "none");
}

static void run_answers(const struct json *it)
{
    struct message request = message_of(json_get(it, "request"));
    struct message message = message_of(json_get(it, "message"));
    const char *event = meaning(&request, &message);
    if (!json_is(json_get(it, "event"), event))
        fail("taken for %s", event);
}

/* On which connection an effect has its order: 0 where order means nothing. */
static long line_of(const char *effect)
{
    static const char *const spoken[] = {"{\"Connect\"", "{\"SendRequest\"", "{\"SendEnd\"",
                                         "{\"SendFault\"", "{\"CloseChannel\""};
    for (size_t i = 0; i < sizeof spoken / sizeof *spoken; i++)
        if (!strncmp(effect, spoken[i], strlen(spoken[i])))
            return -1;
    const char *connection = strstr(effect, "\"connection\":");
    return connection ? strtol(connection + strlen("\"connection\":"), NULL, 10) : 0;
}

/* The same effects, and in the same order on each connection, but for what was not asked for. */
static bool effects_match(const struct effects *ours, const struct json *expected)
{
    bool is_used[EFFECTS_MAX] = {false};
    if (expected->kind != JSON_LIST || expected->size != (size_t)ours->count)
        return false;
    for (const struct json *effect = expected->first; effect; effect = effect->next) {
        long its_line = line_of(effect->raw);
        int found = -1;
        for (int i = 0; i < ours->count && found < 0; i++) {
            bool is_same = !strcmp(ours->lines[i], effect->raw);
            bool is_next = its_line && !ours->is_push[i] && line_of(ours->lines[i]) == its_line;
            if (!is_used[i] && is_next && !is_same)
                break; /* this one should have come first */
            if (!is_used[i] && is_same)
                found = i;
        }
        if (found < 0)
            return false;
        is_used[found] = true;
    }
    return true;
}

static void check_effects(const struct effects *ours, const struct json *expected, int index)
{
    if (effects_match(ours, expected))
        return;
    fail("step %d has other effects", index);
    for (int i = 0; i < ours->count; i++)
        printf("    %s\n", ours->lines[i]);
}

static void run_provider(const struct json *it)
{
    static struct provider provider;
    provider_start(&provider, json_get(it, "limits"), json_get(it, "remembered"));
    int index = 0;
    for (const struct json *step = json_get(it, "steps")->first; step; step = step->next, index++) {
        struct effects effects = {.count = 0};
        provider_step(&provider, json_get(step, "event"), &effects);
        check_effects(&effects, json_get(step, "effects"), index);
        const struct json *state = json_get(step, "states")->first;
        for (; state; state = state->next)
            if (!json_is(state, provider_state(&provider, state->key)))
                fail("step %d: %s is %s", index, state->key, provider_state(&provider, state->key));
    }
}

static void run_consumer(const struct json *it)
{
    const struct json *request = json_get(it, "request");
    struct consumer consumer = {.name = json_get(request, "allocation_id")->text,
                                .request = request->raw};
    int index = 0;
    for (const struct json *step = json_get(it, "steps")->first; step; step = step->next, index++) {
        struct effects effects = {.count = 0};
        const struct json *expected = json_get(step, "effects");
        if (consumer_step(&consumer, json_get(step, "event"), &effects))
            check_effects(&effects, expected, index);
        else if (expected->kind != JSON_NULL)
            fail("step %d is not possible", index);
        if (!json_is(json_get(step, "state"), consumer_state(&consumer)) ||
            !json_is(json_get(step, "notice"), consumer_notice(&consumer)))
            fail("step %d: %s, %s", index, consumer_state(&consumer), consumer_notice(&consumer));
    }
}

/* --- Files --- */

static const struct {
    const char *name;
    void (*run)(const struct json *it);
} families[] = {
    {"frames", run_frames},           {"accepted", run_accepted}, {"invalid", run_invalid},
    {"segments", run_segments},       {"requests", run_requests}, {"answers", run_answers},
    {"descriptors", run_descriptors}, {"provider", run_provider}, {"consumer", run_consumer},
};

static char *file_read(const char *directory, const char *family, const char *name, size_t *size)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s/%s", directory, family, name);
    FILE *file = fopen(path, "rb");
    if (!file)
        return NULL;
    if (fseek(file, 0, SEEK_END))
        give_up("%s: cannot be read", path);
    *size = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(*size + 1);
    if (!text || fread(text, 1, *size, file) != *size)
        give_up("%s: cannot be read", path);
    text[*size] = '\0';
    fclose(file);
    return text;
}

static long long run_file(void (*run)(const struct json *it), char *text)
{
    long long count = 0;
    for (char *line = text; *line; count++) {
        size_t size = strcspn(line, "\n");
        const struct json *it = json_read(line, size);
        if (!it)
            give_up("not JSON: %.80s", line);
        case_id = json_get(it, "id")->text;
        run(it);
        json_forget();
        line += size + (line[size] == '\n');
    }
    case_id = "";
    return count;
}

/* Counts the files of cases in a folder, so that none is overlooked. */
static long long files_in(const char *directory, const char *family)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, family);
    DIR *folder = opendir(path);
    if (!folder)
        give_up("%s: cannot be opened", path);
    long long count = 0;
    for (struct dirent *entry; (entry = readdir(folder));)
        count += strstr(entry->d_name, ".jsonl") != NULL;
    closedir(folder);
    return count;
}

static void run_family(const char *directory, size_t index)
{
    const char *name = families[index].name;
    size_t size;
    char *text = file_read(directory, name, "manifest.json", &size);
    const struct json *manifest = text ? json_read(text, size) : NULL;
    if (!manifest || json_get(manifest, "schema")->number != 1)
        give_up("%s: no manifest of schema 1", name);
    long long wanted = json_get(manifest, "cases")->number, count = 0, listed = 0;
    char files[64][64];
    for (const struct json *one = json_get(manifest, "files")->first; one; one = one->next) {
        if (listed == 64)
            give_up("%s: over 64 files", name);
        snprintf(files[listed++], sizeof files[0], "%s", json_get(one, "file")->text);
    }
    json_forget();
    free(text);
    int failures_before = failures;
    for (long long i = 0; i < listed; i++) {
        if (!(text = file_read(directory, name, files[i], &size)))
            give_up("%s/%s: cannot be opened", name, files[i]);
        count += run_file(families[index].run, text);
        free(text);
    }
    case_id = name;
    if (count != wanted)
        fail("%lld cases; the manifest says %lld", count, wanted);
    if (listed != files_in(directory, name))
        fail("%lld files in the manifest; %lld are there", listed, files_in(directory, name));
    printf("%s %lld cases, %d failures\n", name, count, failures - failures_before);
}

static void run_directory(const char *directory)
{
    enum { COUNT = sizeof families / sizeof *families };
    DIR *folder = opendir(directory);
    if (!folder)
        give_up("%s: cannot be opened", directory);
    bool is_there[COUNT] = {false};
    for (struct dirent *entry; (entry = readdir(folder));) {
        size_t index = 0, size;
        char *manifest = file_read(directory, entry->d_name, "manifest.json", &size);
        while (manifest && index < COUNT && strcmp(entry->d_name, families[index].name))
            index++;
        case_id = entry->d_name;
        if (manifest && index == COUNT)
            fail("a family that is not known here");
        else if (manifest)
            is_there[index] = true;
        free(manifest);
    }
    closedir(folder);
    for (size_t index = 0; index < COUNT; index++) {
        case_id = families[index].name;
        if (is_there[index])
            run_family(directory, index);
        else
            fail("a family that is missing");
    }
}

int main(int count, char **arguments)
{
    if (count != 2)
        give_up("usage: %s DIRECTORY", arguments[0]);
    run_directory(arguments[1]);
    return failures ? 1 : 0;
}
