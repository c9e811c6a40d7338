/* header.c - fuzz target: the header parser (fst_header.c, fst_header_lex.c, fst_batch.c).
 *
 * An input is the number of data bytes behind the header, in decimal, a space, and the header; or
 * a star, and of what to make up a layout. Written out it must be accepted, and be the same.
 * What is rejected must be rejected by both ways to parse, with the same words. What is accepted
 *
 *   - is consistent: tensors cover the data without a gap or an overlap, in order, their sizes
 *     follow from shape and dtype, names are UTF-8;
 *   - parses to the same when it is read from a file, and when the layout is written out again in
 *     another order, with other spaces and escapes;
 *   - is rejected once its end is cut off, or something follows it.
 */
#include "fuzz.h"
#include "header_text.h"

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

static const char *const nothing[2] = {"", ""};
/* JSON has no such numbers, or they are no sizes. */
static const char *const wrong[8][2] = {{"0", ""},  {"-", ""},  {"+", ""},    {"", ".0"},
                                        {"", "E0"}, {"", ",0"}, {"\"", "\""}, {"00", "0"}};

static void check_written(const fst_layout_view *view, uint64_t data, uint64_t style) {
    size_t room = 6 * view->names_bytes + 250 * view->count + 32 * view->dims_count +
                  view->metadata_bytes + 128;
    fst_layout *layout = NULL;
    fst_layout_view again;
    fst_error err = {0};
    char *text = malloc(room);
    MUST(text != NULL);
    size_t bytes = write_out(view, style, nothing, text);
    MUST(bytes <= room);
    int code = parse(text, bytes, data, &layout, &again, &err);
    if (code != FST_OK) (void)fprintf(stderr, "%s\n%.*s\n", err.message, (int)bytes, text);
    MUST(code == FST_OK);
    check_same(view, &again);
    fst_layout_release(&layout);
    bytes = write_out(view, style, wrong[style >> 16 & 7], text);
    MUST(bytes <= room && (view->count == 0 || !is_accepted(text, bytes, data)));
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

/* ---- one header ---- */

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

/* ---- a layout that is made up ---- */

enum {
    TENSORS = 6,
    DIMS = 8
};

typedef struct made_up {
    fst_layout_view view;
    fst_tensor tensors[TENSORS];
    int64_t dims[TENSORS * DIMS];
    char names[TENSORS * 33];
    uint64_t data;
} made_up;

static uint8_t next_byte(const uint8_t **at, const uint8_t *end) {
    return *at < end ? *(*at)++ : 0;
}

/* A few characters: those that have an escape, and the first and the last of each length. */
static void add_name(made_up *m, const uint8_t **at, const uint8_t *end) {
    static const char *const characters[16] = {"a",
                                               "\"",
                                               "\\",
                                               "/",
                                               "\x01",
                                               "\x1f",
                                               " ",
                                               "\x7f",
                                               "\xc2\x80",
                                               "\xdf\xbf",
                                               "\xe0\xa0\x80",
                                               "\xed\x9f\xbf",
                                               "\xee\x80\x80",
                                               "\xef\xbf\xbf",
                                               "\xf0\x90\x80\x80",
                                               "\xf4\x8f\xbf\xbf"};
    char *to = m->names + m->view.names_bytes;
    for (int left = next_byte(at, end) & 7; left >= 0; left--) {
        const char *character = characters[next_byte(at, end) & 15];
        size_t bytes = strlen(character);
        memcpy(to, character, bytes);
        to += bytes;
    }
    *to++ = '\0';
    m->view.names_bytes = (uint64_t)(to - m->names);
}

static void add_tensor(made_up *m, const uint8_t **at, const uint8_t *end) {
    fst_tensor *tensor = &m->tensors[m->view.count++];
    uint8_t what = next_byte(at, end);
    *tensor = (fst_tensor){.begin = m->data,
                           .dims_index = m->view.dims_count,
                           .ndim = what >> 5,
                           .dtype = (what & 31u) % FST_DTYPES};
    if (tensor->ndim == 0 && fst_dtype_bits(tensor->dtype) < 8) tensor->dtype = FST_U8;
    uint64_t elements = 1, bits = fst_dtype_bits(tensor->dtype);
    for (uint32_t d = 0; d < tensor->ndim; d++) {
        uint64_t dim = next_byte(at, end) & 15;
        if (d + 1 == tensor->ndim && bits < 8) dim *= 4; /* whole bytes */
        m->dims[m->view.dims_count++] = (int64_t)dim;
        elements *= dim;
    }
    tensor->end = m->data += elements * bits / 8;
    m->view.dtypes |= 1u << tensor->dtype;
    add_name(m, at, end);
}

/* What is written of it must be accepted, and be it. */
static void check_made_up(const uint8_t *at, const uint8_t *end) {
    static made_up m;
    static char text[TENSORS * 600 + 128];
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    uint64_t style = 0, random = 1;
    m = (made_up){.view = {.tensors = m.tensors, .dims = m.dims, .names = m.names}};
    for (int i = 0; i < 3; i++) style = style << 8 | next_byte(&at, end);
    if (style >> 12 & 1) m.view.metadata = style >> 13 & 1 ? "{ \"a\" :\"\\ud83e\\udd99\"}" : "{}";
    m.view.metadata_bytes = m.view.metadata == NULL ? 0 : strlen(m.view.metadata);
    while (at < end && m.view.count < TENSORS) add_tensor(&m, &at, end);
    header h = {text, write_out(&m.view, style, nothing, text), m.data};
    MUST(h.bytes <= sizeof text);
    int code = parse(h.text, h.bytes, h.data, &layout, &view, &err);
    if (code != FST_OK) (void)fprintf(stderr, "%s\n%.*s\n", err.message, (int)h.bytes, text);
    MUST(code == FST_OK);
    check_same(&m.view, &view);
    fst_layout_release(&layout);
    check(&h, &random);
    check_neighbours(&h, &random);
}

/* ---- an input ---- */

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes) {
    if (bytes > 0 && input[0] == '*') {
        check_made_up(input + 1, input + bytes);
        return 0;
    }
    header h = header_of(input, bytes);
    uint64_t random = random_of(&h);
    check(&h, &random);
    if (h.bytes > 0) check_neighbours(&h, &random);
    return 0;
}
