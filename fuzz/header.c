/* header.c - fuzz target: the header parser (fst_header.c, fst_header_lex.c, fst_batch.c).
 *
 * An input is the number of data bytes behind the header, in decimal, a space, and the header.
 * What is rejected must be rejected by both ways to parse, with the same words. What is accepted
 *
 *   - is consistent: tensors cover the data without a gap or an overlap, in order, their sizes
 *     follow from shape and dtype, names are UTF-8;
 *   - parses to the same when it is read from a file, and when the layout is written out again in
 *     another order, with other spaces and escapes;
 *   - is rejected once its end is cut off, or something follows it.
 */
#include "fuzz.h"
#include "test.h"

#include "file/fst_header.h"
#include "tensor/fst_batch.h"

enum {
    NEIGHBOURS = 7,
    CUTS = 4
};

static uint64_t inputs, accepted, parsed; /* parsed: ways of writing and reading them, too */

typedef struct header {
    const char *text;
    size_t bytes;
    uint64_t data;
} header;

/* ---- what is accepted is consistent ---- */

static void check_tensor(const fst_layout_view *view, const fst_tensor *tensor) {
    static const unsigned bits[FST_DTYPES] = {8,  4,  6,  6,  8,  8,  8,  8,  8,  8,  8,
                                              16, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64};
    MUST(tensor->dtype < FST_DTYPES && tensor->ndim <= 64);
    MUST(tensor->dims_index <= view->dims_count &&
         tensor->ndim <= view->dims_count - tensor->dims_index);
    MUST(view->dtypes >> tensor->dtype & 1u);
    uint64_t elements = 1;
    for (uint32_t i = 0; i < tensor->ndim; i++) {
        int64_t dim = view->dims[tensor->dims_index + i];
        MUST(dim >= 0 && !__builtin_mul_overflow(elements, (uint64_t)dim, &elements));
    }
    MUST((tensor->end - tensor->begin) * 8 == elements * bits[tensor->dtype]);
}

/* Describing the tensors for torch computes strides, which must not overflow. */
static void check_batch(const fst_layout_view *view, uint64_t data) {
    static fst_dl_dtype table[FST_DTYPES];
    fst_arena *arena = NULL;
    fst_batch *batch = NULL;
    fst_error err = {0};
    if (view->count == 0) return;
    for (int i = 0; i < FST_DTYPES; i++) table[i] = (fst_dl_dtype){1, 8, 0, 1};
    MUST(fst_arena_borrow(table, data, &arena, &err) == FST_OK); /* never looked into */
    MUST(fst_batch_create(arena, view, NULL, view->count, NULL, 0, table, &batch, &err) == FST_OK);
    fst_batch_drop(batch, view->count + 1);
    fst_arena_release(&arena);
}

/* The code point at *at, which moves behind it. */
static uint32_t next_code(const char **at) {
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

static void check_layout(const fst_layout_view *view, const header *h) {
    uint64_t at = 0, names = 0;
    for (uint64_t i = 0; i < view->count; i++) {
        MUST(view->tensors[i].begin == at && view->tensors[i].end >= at);
        at = view->tensors[i].end;
        check_tensor(view, &view->tensors[i]);
    }
    MUST(at == h->data && view->data_begin == 8 + h->bytes);
    const char *name = view->names, *end = name + view->names_bytes;
    while (name < end) names += next_code(&name) == 0;
    MUST(name == end && names == view->count && (names == 0 || end[-1] == '\0'));
    if (view->metadata != NULL)
        MUST(view->metadata_bytes >= 2 && view->metadata[0] == '{' &&
             view->metadata[view->metadata_bytes - 1] == '}');
    check_batch(view, h->data);
}

/* ---- the same layout ---- */

static void check_same(const fst_layout_view *a, const fst_layout_view *b) {
    MUST(a->count == b->count && a->dims_count == b->dims_count && a->dtypes == b->dtypes &&
         a->odd_f4 == b->odd_f4);
    MUST(a->names_bytes == b->names_bytes && memcmp(a->names, b->names, a->names_bytes) == 0);
    for (uint64_t i = 0; i < a->count; i++) {
        const fst_tensor *s = &a->tensors[i], *t = &b->tensors[i];
        MUST(s->begin == t->begin && s->end == t->end && s->ndim == t->ndim &&
             s->dtype == t->dtype);
        for (uint32_t d = 0; d < s->ndim; d++)
            MUST(a->dims[s->dims_index + d] == b->dims[t->dims_index + d]);
    }
    MUST((a->metadata == NULL) == (b->metadata == NULL) && a->metadata_bytes == b->metadata_bytes);
    if (a->metadata != NULL) MUST(memcmp(a->metadata, b->metadata, a->metadata_bytes) == 0);
}

static int parse(const char *text, size_t bytes, uint64_t data, fst_layout **layout,
                 fst_layout_view *view, fst_error *err) {
    parsed++;
    int code = fst_layout_parse(text, bytes, 8 + bytes + data, layout, view, err);
    MUST(code == FST_OK || (code == FST_FALLBACK && *layout == NULL && err->message[0] != '\0'));
    return code;
}

static bool is_accepted(const char *text, size_t bytes, uint64_t data) {
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    int code = parse(text, bytes, data, &layout, &view, &err);
    fst_layout_release(&layout);
    return code == FST_OK;
}

/* ---- from a file ---- */

/* The file's bytes: the header's length, the header, zeros. */
static int64_t feed(void *context, uint64_t offset, uint64_t bytes, void *into) {
    const header *h = context;
    unsigned char *to = into;
    uint64_t filled = 0;
    for (; filled < bytes && offset + filled < 8; filled++)
        to[filled] = (unsigned char)((uint64_t)h->bytes >> 8 * (offset + filled));
    if (filled < bytes && offset + filled < 8 + h->bytes) {
        uint64_t from = offset + filled - 8, left = h->bytes - from;
        uint64_t n = left < bytes - filled ? left : bytes - filled;
        memcpy(to + filled, h->text + from, n);
        filled += n;
    }
    memset(to + filled, 0, bytes - filled);
    return (int64_t)bytes;
}

/* Reads the header from a file of so many bytes. */
static int read_layout(header *h, uint64_t file_bytes, fst_layout *cached, fst_layout **layout,
                       fst_layout_view *view, fst_error *err) {
    fst_file *file = NULL;
    fst_file_info info;
    MUST(fst_file_feed("fed", file_bytes, 1, feed, h, &file, &info, err) == FST_OK);
    int code = fst_layout_read(file, cached, layout, view, err);
    fst_file_release(&file);
    return code;
}

static void check_file(header *h, fst_layout *layout, const fst_layout_view *view,
                       const fst_error *rejected) {
    fst_layout *again = NULL;
    fst_layout_view view_again;
    fst_error err = {0};
    parsed++;
    int code = read_layout(h, 8 + h->bytes + h->data, NULL, &again, &view_again, &err);
    if (layout == NULL) {
        MUST(code == FST_FALLBACK && again == NULL && strcmp(err.message, rejected->message) == 0);
        return;
    }
    MUST(code == FST_OK);
    check_same(view, &view_again);
    fst_layout_release(&again);
    code = read_layout(h, 8 + h->bytes + h->data, layout, &again, &view_again, &err);
    MUST(code == FST_PENDING && again == NULL);
    code = read_layout(h, 8 + h->bytes - 1, layout, &again, &view_again, &err);
    MUST(code == FST_FALLBACK && again == NULL);
}

/* ---- written out again ---- */

typedef struct writer {
    char *at;
    uint64_t style; /* random bits */
} writer;

static void put(writer *to, const char *text) {
    size_t bytes = strlen(text);
    memcpy(to->at, text, bytes);
    to->at += bytes;
}

/* A token, and spaces behind it or not. */
static void put_token(writer *to, const char *text) {
    static const char *const spaces[] = {"", "", " ", "\n\t \r"};
    put(to, text);
    put(to, spaces[to->style >> 8 & 3]);
}

static void put_number(writer *to, uint64_t number) {
    char text[24];
    (void)snprintf(text, sizeof text, "%llu", (unsigned long long)number);
    put_token(to, text);
}

static void put_escape(writer *to, uint32_t unit) {
    to->at += sprintf(to->at, to->style >> 3 & 1 ? "\\u%04x" : "\\u%04X", (unsigned)unit);
}

/* The name at *at, which moves behind its NUL. */
static void put_name(writer *to, const char **at) {
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

static void put_field(writer *to, const fst_layout_view *view, const fst_tensor *tensor,
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

static void put_metadata(writer *to, const fst_layout_view *view, bool comma) {
    put_token(to, to->style >> 5 & 1 ? "\"__metadata__\"" : "\"\\u005f_metad\\u0061ta__\"");
    put_token(to, ":");
    memcpy(to->at, view->metadata, view->metadata_bytes);
    to->at += view->metadata_bytes;
    if (comma) put_token(to, ",");
}

/* Whether the parser orders tensors by their offsets alone, and not by their place in the text. */
static bool no_ties(const fst_layout_view *view) {
    for (uint64_t i = 1; i < view->count; i++)
        if (view->tensors[i].begin == view->tensors[i - 1].begin &&
            view->tensors[i].end == view->tensors[i - 1].end)
            return false;
    return true;
}

static size_t write_out(const fst_layout_view *view, uint64_t style, char *text) {
    writer to = {text, style};
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

static void check_written(const fst_layout_view *view, uint64_t data, uint64_t style) {
    size_t room = 6 * view->names_bytes + 200 * view->count + 24 * view->dims_count +
                  view->metadata_bytes + 128;
    fst_layout *layout = NULL;
    fst_layout_view again;
    fst_error err = {0};
    char *text = malloc(room);
    MUST(text != NULL);
    size_t bytes = write_out(view, style, text);
    MUST(bytes <= room);
    int code = parse(text, bytes, data, &layout, &again, &err);
    if (code != FST_OK) (void)fprintf(stderr, "%s\n%.*s\n", err.message, (int)bytes, text);
    MUST(code == FST_OK);
    check_same(view, &again);
    fst_layout_release(&layout);
    free(text);
}

/* ---- cut off ---- */

static bool all_space(const char *text, size_t bytes) {
    size_t spaces = 0;
    while (spaces < bytes && text[spaces] != '\0' && strchr(" \t\n\r", text[spaces]) != NULL)
        spaces++;
    return spaces == bytes;
}

static void check_ends(const header *h, uint64_t *random) {
    char *longer = malloc(h->bytes + 1);
    MUST(longer != NULL);
    memcpy(longer, h->text, h->bytes);
    longer[h->bytes] = (char)test_below(random, 128);
    MUST(is_accepted(longer, h->bytes + 1, h->data) == all_space(longer + h->bytes, 1));
    free(longer);
    for (int i = 0; i < CUTS; i++) {
        size_t left = test_below(random, h->bytes);
        MUST(is_accepted(h->text, left, h->data) == all_space(h->text + left, h->bytes - left));
    }
}

/* ---- an input ---- */

static header header_of(const uint8_t *input, size_t bytes) {
    size_t at = 0;
    uint64_t data = 0;
    while (at < bytes && input[at] >= '0' && input[at] <= '9')
        data = data * 10 + (uint64_t)(input[at++] - '0');
    if (at < bytes && input[at] == ' ') at++;
    header h = {(const char *)input + at, bytes - at, data};
    uint64_t most = (uint64_t)INT64_MAX - 8 - h.bytes; /* no file is larger */
    if (h.data > most) h.data = most;
    return h;
}

/* The same for the same input. */
static uint64_t random_of(const header *h) {
    uint64_t random = h->bytes | 1;
    for (size_t i = 0; i < h->bytes; i++)
        random = (random ^ (unsigned char)h->text[i]) * UINT64_C(0x100000001b3);
    return random | 1;
}

bool fuzz_summary(void) {
    (void)printf("header: %llu headers, %llu accepted, parsed %llu times\n",
                 (unsigned long long)inputs, (unsigned long long)accepted,
                 (unsigned long long)parsed);
    return accepted > inputs / 20 && accepted < inputs;
}

static void summary(void) { (void)fuzz_summary(); }

int LLVMFuzzerInitialize(int *argc, char ***argv) { /* driver.c does not call it */
    (void)argc, (void)argv;
    return atexit(summary);
}

static void check(header *h, uint64_t *random) {
    fst_layout *layout = NULL;
    fst_layout_view view = {0};
    fst_error err = {0};
    int code = parse(h->text, h->bytes, h->data, &layout, &view, &err);
    inputs++;
    if (code == FST_OK) {
        accepted++;
        check_layout(&view, h);
        check_written(&view, h->data, test_random(random));
        check_ends(h, random);
    }
    check_file(h, layout, &view, &err);
    fst_layout_release(&layout);
}

/* libFuzzer takes longer to make an input than the parser to refuse it. So each stands for some
 * more, in which one byte is another one of the same header. */
static void check_neighbours(const header *h, uint64_t *random) {
    char *text = malloc(h->bytes);
    header neighbour = {text, h->bytes, h->data};
    MUST(text != NULL);
    memcpy(text, h->text, h->bytes);
    for (int i = 0; i < NEIGHBOURS; i++) {
        size_t at = test_below(random, h->bytes);
        text[at] = h->text[test_below(random, h->bytes)];
        check(&neighbour, random);
        text[at] = h->text[at];
    }
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes) {
    header h = header_of(input, bytes);
    uint64_t random = random_of(&h);
    check(&h, &random);
    if (h.bytes > 0) check_neighbours(&h, &random);
    return 0;
}
