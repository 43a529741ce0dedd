/* A reader of JSON, as much of it as the vectors need. What it returns lives until json_forget(). */
#ifndef JSON_H
#define JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum json_kind { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_TEXT, JSON_LIST, JSON_MAP };

struct json {
    enum json_kind kind;
    const char *key;  /* in a map, decoded; never with a NUL inside */
    const char *text; /* of a text: decoded UTF-8, NUL-terminated, perhaps with more NULs inside */
    size_t size;      /* of a text: its bytes; of a list or a map: how many are in it */
    long long number;
    const struct json *first, *next; /* first of what is inside; next beside this one */
    const char *raw;                 /* as it stands in the file, NUL-terminated */
};

/* Reads one value; NULL if the text is no JSON. */
const struct json *json_read(const char *text, size_t size);

/* Finds what stands under a key; ends the program if there is none. */
const struct json *json_get(const struct json *map, const char *key);

bool json_is(const struct json *text, const char *expected);

/* Bytes that live as long as what was read. */
void *json_room(size_t size);
void json_forget(void);

/* Says what is wrong with the vectors or with this program, and ends it. */
_Noreturn void give_up(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
