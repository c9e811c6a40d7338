/* fst_header_lex.c - the pieces of a header's JSON: see fst_header_lex.h. */
#include "file/fst_header_lex.h"

#include <string.h>

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

static bool four_hex(fst_lexer *in, unsigned *out) {
    if (in->end - in->at < 4) return fst_lex_reject(in, "short \\u escape");
    unsigned value = 0;
    for (int i = 0; i < 4; i++) {
        int digit = hex_digit(*in->at++);
        if (digit < 0) return fst_lex_reject(in, "bad \\u escape");
        value = value << 4 | (unsigned)digit;
    }
    *out = value;
    return true;
}

static size_t put_utf8(char *to, unsigned code) {
    if (code < 0x80) {
        to[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        to[0] = (char)(0xC0 | code >> 6);
        to[1] = (char)(0x80 | (code & 0x3F));
        return 2;
    }
    if (code < 0x10000) {
        to[0] = (char)(0xE0 | code >> 12);
        to[1] = (char)(0x80 | (code >> 6 & 0x3F));
        to[2] = (char)(0x80 | (code & 0x3F));
        return 3;
    }
    to[0] = (char)(0xF0 | code >> 18);
    to[1] = (char)(0x80 | (code >> 12 & 0x3F));
    to[2] = (char)(0x80 | (code >> 6 & 0x3F));
    to[3] = (char)(0x80 | (code & 0x3F));
    return 4;
}

static bool unicode_escape(fst_lexer *in, char **to) {
    unsigned code, low;
    if (!four_hex(in, &code)) return false;
    if (code >= 0xDC00 && code <= 0xDFFF) return fst_lex_reject(in, "lone surrogate");
    if (code >= 0xD800 && code <= 0xDBFF) {
        if (in->end - in->at < 2 || in->at[0] != '\\' || in->at[1] != 'u')
            return fst_lex_reject(in, "lone surrogate");
        in->at += 2;
        if (!four_hex(in, &low)) return false;
        if (low < 0xDC00 || low > 0xDFFF) return fst_lex_reject(in, "lone surrogate");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code == 0) return fst_lex_reject(in, "NUL in a string");
    *to += put_utf8(*to, code);
    return true;
}

static bool escape(fst_lexer *in, char **to) {
    static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
    if (in->at >= in->end) return fst_lex_reject(in, "string not closed");
    char c = *in->at++;
    if (c == 'u') return unicode_escape(in, to);
    const char *found = c == '\0' ? NULL : strchr(from, c);
    if (found == NULL) return fst_lex_reject(in, "unknown escape");
    *(*to)++ = into[found - from];
    return true;
}

bool fst_lex_string(fst_lexer *in, char **to) {
    if (!fst_lex_expect(in, '"', "string expected")) return false;
    while (in->at < in->end) {
        const char *run = in->at;
        while (in->at < in->end && *in->at != '"' && *in->at != '\\' &&
               (unsigned char)*in->at >= 0x20)
            in->at++;
        size_t bytes = (size_t)(in->at - run);
        memcpy(*to, run, bytes);
        *to += bytes;
        if (in->at >= in->end) break;
        char c = *in->at++;
        if (c == '"') return true;
        if (c != '\\') return fst_lex_reject(in, "control character in a string");
        if (!escape(in, to)) return false;
    }
    return fst_lex_reject(in, "string not closed");
}

bool fst_lex_unsigned(fst_lexer *in, uint64_t *out) {
    fst_lex_space(in);
    const char *first = in->at;
    uint64_t value = 0;
    while (in->at < in->end && *in->at >= '0' && *in->at <= '9') {
        uint64_t digit = (uint64_t)(*in->at++ - '0');
        if (value > ((uint64_t)INT64_MAX - digit) / 10)
            return fst_lex_reject(in, "number too large");
        value = value * 10 + digit;
    }
    if (in->at == first) return fst_lex_reject(in, "unsigned integer expected");
    if (*first == '0' && in->at - first > 1) return fst_lex_reject(in, "leading zero");
    if (in->at < in->end && (*in->at == '.' || *in->at == 'e' || *in->at == 'E'))
        return fst_lex_reject(in, "not an integer");
    *out = value;
    return true;
}

bool fst_lex_plain_string(fst_lexer *in, const char **text, size_t *bytes) {
    if (!fst_lex_expect(in, '"', "string expected")) return false;
    *text = in->at;
    while (in->at < in->end && *in->at != '"' && *in->at != '\\' && (unsigned char)*in->at >= 0x20)
        in->at++;
    if (in->at >= in->end || *in->at != '"') return fst_lex_reject(in, "unusual string");
    *bytes = (size_t)(in->at++ - *text);
    return true;
}

bool fst_lex_utf8(const fst_lexer *in) {
    const unsigned char *at = (const unsigned char *)in->at;
    const unsigned char *end = (const unsigned char *)in->end;
    while (at < end) {
        if (*at < 0x80) {
            at++;
            continue;
        }
        int extra = *at >= 0xC2 && *at <= 0xDF   ? 1
                    : *at >= 0xE0 && *at <= 0xEF ? 2
                    : *at >= 0xF0 && *at <= 0xF4 ? 3
                                                 : 0;
        if (extra == 0 || end - at <= extra) return false;
        if ((*at == 0xE0 && at[1] < 0xA0) || (*at == 0xED && at[1] > 0x9F) ||
            (*at == 0xF0 && at[1] < 0x90) || (*at == 0xF4 && at[1] > 0x8F))
            return false;
        for (int i = 1; i <= extra; i++)
            if ((at[i] & 0xC0) != 0x80) return false;
        at += extra + 1;
    }
    return true;
}
