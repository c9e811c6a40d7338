/* header_text.h - a layout as the text of a header: in either order, with spaces and escapes or
 * without.
 */
#ifndef FUZZ_HEADER_TEXT_H
#define FUZZ_HEADER_TEXT_H

#include "test.h"

/* The code point at *at, which moves behind it. */
static inline uint32_t next_code(const char **at) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char first = (unsigned char)*(*at)++;
    if (first < 0x80) return first;
    int length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    MUST(first >= 0xC0 && first < 0xF8);
    uint32_t code = first & (0x7Fu >> length);
    for (int i = 1; i < length; i++) {
        unsigned char more = (unsigned char)*(*at)++;
        MUST((more & 0xC0) == 0x80);
        code = code << 6 | (more & 0x3F);
    }
    MUST(code >= least[length] && code <= 0x10FFFF && (code < 0xD800 || code > 0xDFFF));
    return code;
}

typedef struct writer {
    char *at;
    uint64_t style;            /* random bits */
    const char *const *around; /* what is written before and after each number */
} writer;

static inline void put(writer *to, const char *text) {
    size_t bytes = strlen(text);
    memcpy(to->at, text, bytes);
    to->at += bytes;
}

/* A token, and spaces behind it or not. */
static inline void put_token(writer *to, const char *text) {
    static const char *const spaces[] = {"", "", " ", "\n\t \r"};
    put(to, text);
    put(to, spaces[to->style >> 8 & 3]);
}

static inline void put_number(writer *to, uint64_t number) {
    put(to, to->around[0]);
    to->at += sprintf(to->at, "%llu", (unsigned long long)number);
    put_token(to, to->around[1]);
}

static inline void put_escape(writer *to, uint32_t unit) {
    to->at += sprintf(to->at, to->style >> 3 & 1 ? "\\u%04x" : "\\u%04X", (unsigned)unit);
}

/* The name at *at, which moves behind its NUL. */
static inline void put_name(writer *to, const char **at) {
    bool escapes = to->style >> 2 & 1;
    *to->at++ = '"';
    for (;;) {
        const char *from = *at;
        uint32_t code = next_code(at);
        if (code == 0) break;
        if (code > 0xFFFF && escapes) {
            put_escape(to, 0xD800 + ((code - 0x10000) >> 10));
            put_escape(to, 0xDC00 + ((code - 0x10000) & 0x3FF));
        } else if (escapes || code < 0x20 || code == '"' || code == '\\') {
            put_escape(to, code);
        } else {
            memcpy(to->at, from, (size_t)(*at - from));
            to->at += *at - from;
        }
    }
    put_token(to, "\"");
    put_token(to, ":");
}

static inline void put_field(writer *to, const fst_layout_view *view, const fst_tensor *tensor,
                             uint64_t which) {
    static const char *const dtypes[FST_DTYPES] = {
        "BOOL",    "F4",          "F6_E2M3",     "F6_E3M2", "U8",  "I8",  "F8_E5M2", "F8_E4M3",
        "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",     "U16", "F16", "BF16",    "I32",
        "U32",     "F32",         "C64",         "F64",     "I64", "U64",
    };
    static const char *const keys[] = {"\"dtype\"", "\"shape\"", "\"data_offsets\""};
    put_token(to, keys[which]);
    put_token(to, ":");
    if (which == 0) {
        put(to, "\"");
        put(to, dtypes[tensor->dtype]);
        put_token(to, "\"");
        return;
    }
    put_token(to, "[");
    for (uint32_t d = 0; which == 1 && d < tensor->ndim; d++) {
        if (d > 0) put_token(to, ",");
        put_number(to, (uint64_t)view->dims[tensor->dims_index + d]);
    }
    if (which == 2) {
        put_number(to, tensor->begin);
        put_token(to, ",");
        put_number(to, tensor->end);
    }
    put_token(to, "]");
}

static inline void put_metadata(writer *to, const fst_layout_view *view, bool comma) {
    put_token(to, to->style >> 5 & 1 ? "\"__metadata__\"" : "\"\\u005f_metad\\u0061ta__\"");
    put_token(to, ":");
    memcpy(to->at, view->metadata, view->metadata_bytes);
    to->at += view->metadata_bytes;
    if (comma) put_token(to, ",");
}

/* Whether the parser orders tensors by their offsets alone, and not by their place in the text. */
static inline bool no_ties(const fst_layout_view *view) {
    for (uint64_t i = 1; i < view->count; i++)
        if (view->tensors[i].begin == view->tensors[i - 1].begin &&
            view->tensors[i].end == view->tensors[i - 1].end)
            return false;
    return true;
}

static inline size_t write_out(const fst_layout_view *view, uint64_t style,
                               const char *const *around, char *text) {
    writer to = {text, style, around};
    bool backwards = style & 1 && no_ties(view), last = style >> 4 & 1;
    const char *name = backwards ? view->names + view->names_bytes : view->names;
    put_token(&to, "{");
    if (view->metadata != NULL && !last) put_metadata(&to, view, view->count > 0);
    for (uint64_t i = 0; i < view->count; i++) {
        if (i > 0) put_token(&to, ",");
        if (backwards)
            for (name--; name > view->names && name[-1] != '\0';) name--;
        const char *at = name;
        put_name(&to, &at);
        if (!backwards) name = at;
        put_token(&to, "{");
        const fst_tensor *tensor = &view->tensors[backwards ? view->count - 1 - i : i];
        for (uint64_t k = 0; k < 3; k++) {
            if (k > 0) put_token(&to, ",");
            put_field(&to, view, tensor, ((style >> 6 & 3) + k) % 3);
        }
        put_token(&to, "}");
    }
    if (view->metadata != NULL && last) {
        if (view->count > 0) put_token(&to, ",");
        put_metadata(&to, view, false);
    }
    put_token(&to, "}");
    return (size_t)(to.at - text);
}

#endif
