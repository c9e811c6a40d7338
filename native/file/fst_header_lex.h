/* fst_header_lex.h - a cursor over a header's JSON, and the tokens read with it.
 *
 * For fst_header.c only. Functions that return bool say false when the text is not what they
 * expect, and note why in `reason`; the first one stays. They allocate nothing and keep
 * nothing: strings are pointers into the text, or copied where the caller has room for them.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fst_lexer {
    const char *at;
    const char *end;
    const char *begin;
    const char *reason; /* why the text was rejected; NULL: it was not */
} fst_lexer;

/* The smallest ones are inline: as calls they made parsing 5 % slower. */

static inline bool fst_lex_reject(fst_lexer *in, const char *why) {
    if (in->reason == NULL) in->reason = why;
    return false;
}

static inline void fst_lex_space(fst_lexer *in) {
    while (in->at < in->end &&
           (*in->at == ' ' || *in->at == '\n' || *in->at == '\t' || *in->at == '\r'))
        in->at++;
}

/* Whether c is the next character that is no space; the cursor stays before it. */
static inline bool fst_lex_peek(fst_lexer *in, char c) {
    fst_lex_space(in);
    return in->at < in->end && *in->at == c;
}

static inline bool fst_lex_expect(fst_lexer *in, char c, const char *why) {
    if (!fst_lex_peek(in, c)) return fst_lex_reject(in, why);
    in->at++;
    return true;
}

/* After an element: true to go on, false at the closing character or when the text is rejected. */
static inline bool fst_lex_more(fst_lexer *in, char close, bool *bad) {
    fst_lex_space(in);
    if (in->at < in->end && *in->at == ',') {
        in->at++;
        return true;
    }
    *bad = !fst_lex_expect(in, close, "',' or a closing bracket expected");
    return false;
}

/* Unescapes the string at the cursor into *to, which has room for its raw length:
 * no escape is shorter than what it stands for. */
bool fst_lex_string(fst_lexer *in, char **to);
/* A short literal without escapes, such as a key or a dtype. */
bool fst_lex_plain_string(fst_lexer *in, const char **text, size_t *bytes);
bool fst_lex_unsigned(fst_lexer *in, uint64_t *out); /* up to INT64_MAX */
bool fst_lex_utf8(const fst_lexer *in);              /* whether the rest of the text is */
