#include "json.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_BYTES = 1 << 20 };

struct block {
    struct block *before;
    size_t used, size;
    max_align_t bytes[];
};

static struct block *blocks;

void *json_room(size_t size)
{
    size = (size + sizeof(max_align_t) - 1) / sizeof(max_align_t) * sizeof(max_align_t);
    if (!blocks || blocks->size - blocks->used < size) {
        size_t wanted = size > BLOCK_BYTES ? size : BLOCK_BYTES;
        struct block *block = calloc(1, sizeof *block + wanted);
        if (!block)
            give_up("no memory");
        *block = (struct block){.before = blocks, .size = wanted};
        blocks = block;
    }
    void *room = (char *)blocks->bytes + blocks->used;
    blocks->used += size;
    return room;
}

void json_forget(void)
{
    while (blocks && blocks->before) {
        struct block *before = blocks->before;
        free(blocks);
        blocks = before;
    }
    if (blocks) { /* the first one is kept for the next */
        memset(blocks->bytes, 0, blocks->used);
        blocks->used = 0;
    }
}

void give_up(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

static const char *at, *end; /* what is left to read */

static void skip_space(void)
{
    while (at < end && strchr(" \t\r\n", *at))
        at++;
}

static bool take(char expected)
{
    skip_space();
    if (at == end || *at != expected)
        return false;
    at++;
    return true;
}

static int hex4(void)
{
    char digits[5] = {0};
    if (end - at < 4)
        return -1;
    memcpy(digits, at, 4);
    at += 4;
    char *rest;
    long value = strtol(digits, &rest, 16);
    return *rest ? -1 : (int)value;
}

static char *put_utf8(char *out, long point)
{
    if (point < 0x80) {
        *out++ = (char)point;
    } else if (point < 0x800) {
        *out++ = (char)(0xC0 | point >> 6);
        *out++ = (char)(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
        *out++ = (char)(0xE0 | point >> 12);
        *out++ = (char)(0x80 | (point >> 6 & 0x3F));
        *out++ = (char)(0x80 | (point & 0x3F));
    } else {
        *out++ = (char)(0xF0 | point >> 18);
        *out++ = (char)(0x80 | (point >> 12 & 0x3F));
        *out++ = (char)(0x80 | (point >> 6 & 0x3F));
        *out++ = (char)(0x80 | (point & 0x3F));
    }
    return out;
}

static bool read_text(const char **text, size_t *size)
{
    if (!take('"'))
        return false;
    const char *close = at;
    while (close < end && *close != '"')
        close += 1 + (*close == '\\');
    char *start = json_room((size_t)(close - at) + 1), *out = start;
    while (at < end && *at != '"') {
        if (*at != '\\') {
            *out++ = *at++;
            continue;
        }
        if (end - at < 2)
            return false;
        at++;
        static const char escapes[] = "\"\"\\\\//b\bf\fn\nr\rt\t";
        char escape = *at++;
        if (escape == 'u') {
            long point = hex4();
            if (point >= 0xD800 && point < 0xDC00 && end - at > 6 && at[0] == '\\') {
                at += 2;
                point = 0x10000 + ((point - 0xD800) << 10) + (hex4() - 0xDC00);
            }
            if (point < 0)
                return false;
            out = put_utf8(out, point);
            continue;
        }
        size_t i = 0;
        while (i < sizeof escapes - 1 && escapes[i] != escape)
            i += 2;
        if (i >= sizeof escapes - 1)
            return false;
        *out++ = escapes[i + 1];
    }
    *text = start;
    *size = (size_t)(out - start);
    return take('"');
}

static struct json *read_value(void);

static bool read_inside(struct json *container, char close)
{
    const struct json **link = &container->first;
    if (take(close))
        return true;
    do {
        const char *key = NULL;
        size_t key_size;
        if (container->kind == JSON_MAP && !(read_text(&key, &key_size) && take(':')))
            return false;
        struct json *value = read_value();
        if (!value)
            return false;
        value->key = key;
        *link = value;
        link = &value->next;
        container->size++;
    } while (take(','));
    return take(close);
}

static bool read_into(struct json *value)
{
    static const struct {
        const char *word;
        enum json_kind kind;
    } words[] = {{"null", JSON_NULL}, {"false", JSON_FALSE}, {"true", JSON_TRUE}};
    for (size_t i = 0; i < 3; i++) {
        size_t size = strlen(words[i].word);
        if ((size_t)(end - at) >= size && !memcmp(at, words[i].word, size)) {
            value->kind = words[i].kind;
            at += size;
            return true;
        }
    }
    if (*at == '"') {
        value->kind = JSON_TEXT;
        return read_text(&value->text, &value->size);
    }
    if (*at == '{' || *at == '[') {
        value->kind = *at == '{' ? JSON_MAP : JSON_LIST;
        return read_inside(value, *at++ == '{' ? '}' : ']');
    }
    bool is_negative = *at == '-';
    at += is_negative;
    const char *digits = at;
    for (; at < end && *at >= '0' && *at <= '9'; at++)
        value->number = value->number * 10 + (*at - '0');
    value->kind = JSON_NUMBER;
    value->number *= is_negative ? -1 : 1;
    return at > digits && at - digits < 18;
}

static struct json *read_value(void)
{
    skip_space();
    if (at == end)
        return NULL;
    struct json *value = json_room(sizeof *value);
    const char *start = at;
    if (!read_into(value))
        return NULL;
    char *raw = json_room((size_t)(at - start) + 1);
    memcpy(raw, start, (size_t)(at - start));
    value->raw = raw;
    return value;
}

const struct json *json_read(const char *text, size_t size)
{
    at = text;
    end = text + size;
    const struct json *value = read_value();
    skip_space();
    return at == end ? value : NULL;
}

const struct json *json_get(const struct json *map, const char *key)
{
    for (const struct json *value = map->first; value; value = value->next)
        if (value->key && !strcmp(value->key, key))
            return value;
    give_up("no \"%s\" in %.200s", key, map->raw);
}

bool json_is(const struct json *text, const char *expected)
{
    return text->kind == JSON_TEXT && !strcmp(text->text, expected);
}
