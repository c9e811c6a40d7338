/* fst_header.c - the JSON header of a safetensors file, parsed and validated.
 *
 * It accepts less than JSON: what safetensors writers produce, in any spacing and key order. It
 * answers FST_FALLBACK to everything else, and the caller then asks stock, which decides and words
 * the error. To accept less than stock costs speed on an odd file; to accept more would be a wrong
 * result.
 *
 * One pass over the bytes, no recursion (the format's depth is fixed), all arithmetic on
 * file-supplied numbers overflow-checked.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "base/fst_sys.h"
#include "file/fst_file.h"
#include "file/fst_header.h"
#include "file/fst_header_lex.h"

#define LENGTH_BYTES 8u
#define FIRST_BYTES (16u << 10)     /* copied in 1 us, where a read of its own takes 0.1 ms */
#define MAX_HEADER_BYTES 100000000u /* stock's limit */

struct fst_layout {
    fst_layout_view view;
    fst_tensor *tensors;
    int64_t *dims;
    char *names;
    char *header; /* owned copy: metadata points into it, cached layouts compare it */
    uint64_t header_bytes;
    uint64_t file_bytes;
};

#define DTYPE(name, bits) [FST_##name] = {#name, bits}
static const struct {
    const char *name;
    unsigned bits;
} dtypes[FST_DTYPES] = {
    DTYPE(BOOL, 8),    DTYPE(F4, 4),          DTYPE(F6_E2M3, 6),     DTYPE(F6_E3M2, 6),
    DTYPE(U8, 8),      DTYPE(I8, 8),          DTYPE(F8_E5M2, 8),     DTYPE(F8_E4M3, 8),
    DTYPE(F8_E8M0, 8), DTYPE(F8_E4M3FNUZ, 8), DTYPE(F8_E5M2FNUZ, 8), DTYPE(I16, 16),
    DTYPE(U16, 16),    DTYPE(F16, 16),        DTYPE(BF16, 16),       DTYPE(I32, 32),
    DTYPE(U32, 32),    DTYPE(F32, 32),        DTYPE(C64, 64),        DTYPE(F64, 64),
    DTYPE(I64, 64),    DTYPE(U64, 64),
};

uint32_t fst_dtype_bits(uint32_t dtype) { return dtype < FST_DTYPES ? dtypes[dtype].bits : 0; }

/* ---- growing while parsing ---- */

typedef struct entry { /* a tensor before sorting */
    fst_tensor tensor;
    uint64_t name_begin; /* in parser.names */
    uint64_t name_end;   /* past its NUL */
    uint64_t order;
} entry;

typedef struct parser {
    fst_lexer in;
    bool no_memory;
    entry *entries;
    size_t count, entries_room;
    int64_t *dims;
    size_t dims_count, dims_room;
    char *names;
    size_t names_bytes;
    const char *metadata;
    size_t metadata_bytes;
    bool metadata_seen;
} parser;

/* The array with room for one more element, NULL when there is no memory (the array stays
 * as it was). Doubles, so amortised constant. */
static void *reserve(parser *p, void *array, size_t *room, size_t count, size_t element) {
    if (count < *room) return array;
    size_t grown = *room == 0 ? 64 : *room * 2;
    void *moved = NULL;
    if (grown > *room && grown <= SIZE_MAX / element) moved = realloc(array, grown * element);
    if (moved == NULL)
        p->no_memory = true;
    else
        *room = grown;
    return moved;
}

/* ---- grammar ---- */

static bool is(const char *text, size_t bytes, const char *literal) {
    return strlen(literal) == bytes && memcmp(text, literal, bytes) == 0;
}

static bool parse_dtype(parser *p, uint32_t *out) {
    const char *text;
    size_t bytes;
    if (!fst_lex_plain_string(&p->in, &text, &bytes)) return false;
    for (uint32_t i = 0; i < FST_DTYPES; i++) {
        if (is(text, bytes, dtypes[i].name)) {
            *out = i;
            return true;
        }
    }
    return fst_lex_reject(&p->in, "unknown dtype");
}

static bool parse_shape(parser *p, fst_tensor *tensor) {
    bool bad = false;
    if (!fst_lex_expect(&p->in, '[', "shape is not an array")) return false;
    tensor->dims_index = p->dims_count;
    if (fst_lex_peek(&p->in, ']')) {
        p->in.at++;
        return true;
    }
    do {
        uint64_t dim;
        if (!fst_lex_unsigned(&p->in, &dim)) return false;
        int64_t *dims = reserve(p, p->dims, &p->dims_room, p->dims_count, sizeof *dims);
        if (dims == NULL) return false;
        p->dims = dims;
        dims[p->dims_count++] = (int64_t)dim;
        if (++tensor->ndim > 64) return fst_lex_reject(&p->in, "more than 64 dimensions");
    } while (fst_lex_more(&p->in, ']', &bad));
    return !bad;
}

static bool parse_offsets(parser *p, fst_tensor *tensor) {
    return fst_lex_expect(&p->in, '[', "data_offsets is not an array") &&
           fst_lex_unsigned(&p->in, &tensor->begin) &&
           fst_lex_expect(&p->in, ',', "data_offsets has not two entries") &&
           fst_lex_unsigned(&p->in, &tensor->end) &&
           fst_lex_expect(&p->in, ']', "data_offsets has not two entries");
}

static bool parse_tensor(parser *p, fst_tensor *tensor) {
    enum {
        DTYPE = 1,
        SHAPE = 2,
        OFFSETS = 4
    };
    int seen = 0;
    bool bad = false;
    memset(tensor, 0, sizeof *tensor);
    if (!fst_lex_expect(&p->in, '{', "tensor is not an object")) return false;
    do {
        const char *key;
        size_t bytes;
        int which;
        fst_lex_space(&p->in);
        if (!fst_lex_plain_string(&p->in, &key, &bytes) ||
            !fst_lex_expect(&p->in, ':', "':' expected"))
            return false;
        if (is(key, bytes, "dtype")) {
            which = DTYPE;
            if (!parse_dtype(p, &tensor->dtype)) return false;
        } else if (is(key, bytes, "shape")) {
            which = SHAPE;
            if (seen & SHAPE || !parse_shape(p, tensor))
                return fst_lex_reject(&p->in, "shape twice");
        } else if (is(key, bytes, "data_offsets")) {
            which = OFFSETS;
            if (!parse_offsets(p, tensor)) return false;
        } else {
            return fst_lex_reject(&p->in, "unknown tensor field");
        }
        if (seen & which) return fst_lex_reject(&p->in, "tensor field twice");
        seen |= which;
    } while (fst_lex_more(&p->in, '}', &bad));
    if (bad) return false;
    return seen == (DTYPE | SHAPE | OFFSETS) || fst_lex_reject(&p->in, "tensor field missing");
}

/* An object of strings to strings; remembers its span for the caller to decode. */
static bool parse_metadata(parser *p, char *scratch) {
    bool bad = false;
    if (p->metadata_seen) return fst_lex_reject(&p->in, "__metadata__ twice");
    p->metadata_seen = true;
    fst_lex_space(&p->in);
    if (p->in.end - p->in.at >= 4 && memcmp(p->in.at, "null", 4) == 0) { /* as if absent */
        p->in.at += 4;
        return true;
    }
    p->metadata = p->in.at;
    if (!fst_lex_expect(&p->in, '{', "__metadata__ is not an object")) return false;
    if (fst_lex_peek(&p->in, '}')) {
        p->in.at++;
    } else {
        do {
            char *to = scratch;
            if (!fst_lex_string(&p->in, &to) || !fst_lex_expect(&p->in, ':', "':' expected"))
                return false;
            fst_lex_space(&p->in);
            to = scratch;
            if (!fst_lex_string(&p->in, &to)) return false;
        } while (fst_lex_more(&p->in, '}', &bad));
        if (bad) return false;
    }
    p->metadata_bytes = (size_t)(p->in.at - p->metadata);
    return true;
}

static bool parse_member(parser *p) {
    char *name = p->names + p->names_bytes, *to = name;
    fst_lex_space(&p->in);
    if (!fst_lex_string(&p->in, &to) || !fst_lex_expect(&p->in, ':', "':' expected")) return false;
    if (is(name, (size_t)(to - name), "__metadata__")) return parse_metadata(p, name);
    entry *entries = reserve(p, p->entries, &p->entries_room, p->count, sizeof *entries);
    if (entries == NULL) return false;
    p->entries = entries;
    entry *e = &entries[p->count];
    if (!parse_tensor(p, &e->tensor)) return false;
    *to++ = '\0'; /* fits: two quotes were dropped */
    e->name_begin = p->names_bytes;
    e->name_end = (uint64_t)(to - p->names);
    e->order = p->count;
    p->names_bytes = (size_t)(to - p->names);
    p->count++;
    return true;
}

static bool parse_header(parser *p) {
    bool bad = false;
    if (!fst_lex_expect(&p->in, '{', "header is not an object")) return false;
    if (fst_lex_peek(&p->in, '}')) {
        p->in.at++;
    } else {
        do {
            if (!parse_member(p)) return false;
        } while (fst_lex_more(&p->in, '}', &bad));
        if (bad) return false;
    }
    fst_lex_space(&p->in);
    return p->in.at == p->in.end || fst_lex_reject(&p->in, "bytes after the header's object");
}

/* ---- validation, as stock's Metadata::validate ---- */

static int by_offset(const void *left, const void *right) {
    const entry *a = left, *b = right;
    if (a->tensor.begin != b->tensor.begin) return a->tensor.begin < b->tensor.begin ? -1 : 1;
    if (a->tensor.end != b->tensor.end) return a->tensor.end < b->tensor.end ? -1 : 1;
    return a->order < b->order ? -1 : a->order > b->order;
}

static void sort_entries(parser *p) {
    for (size_t i = 1; i < p->count; i++) {
        if (by_offset(&p->entries[i - 1], &p->entries[i]) > 0) {
            qsort(p->entries, p->count, sizeof *p->entries, by_offset);
            return;
        }
    }
}

static bool tensor_bytes(const parser *p, const fst_tensor *tensor, uint64_t *out) {
    uint64_t elements = 1, bits;
    int64_t stride = 1; /* [0, 2**62, 4] has no element, which stock accepts, but no strides */
    for (uint32_t i = 0; i < tensor->ndim; i++) {
        int64_t dim = p->dims[tensor->dims_index + i];
        if (__builtin_mul_overflow(elements, (uint64_t)dim, &elements)) return false;
        if (dim > 1 && __builtin_mul_overflow(stride, dim, &stride)) return false;
    }
    if (__builtin_mul_overflow(elements, (uint64_t)dtypes[tensor->dtype].bits, &bits)) return false;
    if (bits % 8 != 0) return false;
    *out = bits / 8;
    return true;
}

static bool validate(parser *p, uint64_t data_bytes) {
    uint64_t start = 0;
    for (size_t i = 0; i < p->count; i++) {
        const fst_tensor *tensor = &p->entries[i].tensor;
        uint64_t bytes;
        if (tensor->begin != start || tensor->end < tensor->begin)
            return fst_lex_reject(&p->in, "offsets do not follow each other");
        if (!tensor_bytes(p, tensor, &bytes) || bytes != tensor->end - tensor->begin)
            return fst_lex_reject(&p->in, "shape, dtype and offsets disagree");
        start = tensor->end;
    }
    return start == data_bytes || fst_lex_reject(&p->in, "file length and offsets disagree");
}

/* ---- result ---- */

static bool fill_layout(parser *p, fst_layout *layout) {
    size_t count = p->count == 0 ? 1 : p->count;
    layout->tensors = calloc(count, sizeof *layout->tensors);
    layout->names = malloc(p->names_bytes == 0 ? 1 : p->names_bytes);
    if (layout->tensors == NULL || layout->names == NULL) return false;
    layout->dims = p->dims;
    p->dims = NULL;
    fst_layout_view *view = &layout->view;
    char *to = layout->names;
    for (size_t i = 0; i < p->count; i++) {
        const entry *e = &p->entries[i];
        const fst_tensor *tensor = &e->tensor;
        layout->tensors[i] = *tensor;
        size_t bytes = (size_t)(e->name_end - e->name_begin);
        memcpy(to, p->names + e->name_begin, bytes);
        to += bytes;
        view->dtypes |= 1u << tensor->dtype;
        if (tensor->dtype == FST_F4 &&
            (tensor->ndim == 0 || layout->dims[tensor->dims_index + tensor->ndim - 1] % 2 != 0))
            view->odd_f4 = 1;
    }
    view->count = p->count;
    view->data_begin = layout->header_bytes + LENGTH_BYTES;
    view->tensors = layout->tensors;
    view->dims = layout->dims;
    view->dims_count = p->dims_count;
    view->names = layout->names;
    view->names_bytes = p->names_bytes;
    view->metadata = p->metadata;
    view->metadata_bytes = p->metadata_bytes;
    view->header = layout->header;
    view->header_bytes = layout->header_bytes;
    return true;
}

/* From the header's bytes to a filled layout; what is wrong is noted in the parser. */
static void parse(parser *p, fst_layout *layout) {
    if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__)
        (void)fst_lex_reject(&p->in, "this machine is big-endian and the file is not");
    else if (!fst_lex_utf8(&p->in))
        (void)fst_lex_reject(&p->in, "header is not UTF-8");
    else if (parse_header(p)) {
        sort_entries(p);
        (void)validate(p, layout->file_bytes - LENGTH_BYTES - layout->header_bytes);
    }
    if (p->in.reason == NULL && !p->no_memory && !fill_layout(p, layout)) p->no_memory = true;
}

/* Takes over the header buffer, also on failure. */
static int parse_owned(char *header, uint64_t header_bytes, uint64_t file_bytes, fst_layout **out,
                       fst_layout_view *view, fst_error *err) {
    parser p = {.in = {.at = header, .begin = header, .end = header + header_bytes}};
    fst_layout *layout = calloc(1, sizeof *layout);
    int code = FST_OK;
    p.names = malloc(header_bytes + 1);
    p.no_memory = layout == NULL || p.names == NULL;
    if (p.no_memory) {
        free(header);
    } else {
        layout->header = header;
        layout->header_bytes = header_bytes;
        layout->file_bytes = file_bytes;
        parse(&p, layout);
    }
    if (p.no_memory)
        code = fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory to parse a header of %llu bytes",
                        (unsigned long long)header_bytes);
    else if (p.in.reason != NULL)
        code = fst_fail(err, FST_FALLBACK, 0, "header byte %lld: %s",
                        (long long)(p.in.at - p.in.begin), p.in.reason);
    free(p.entries);
    free(p.dims);
    free(p.names);
    if (code != FST_OK) {
        fst_layout_release(&layout);
        return code;
    }
    *view = layout->view;
    *out = layout;
    return FST_OK;
}

int fst_layout_parse(const char *header, uint64_t header_bytes, uint64_t file_size,
                     fst_layout **out, fst_layout_view *view, fst_error *err) {
    *out = NULL;
    if (header_bytes > MAX_HEADER_BYTES || file_size < LENGTH_BYTES + header_bytes)
        return fst_fail(err, FST_FALLBACK, 0, "header length %llu does not fit the file",
                        (unsigned long long)header_bytes);
    char *copy = malloc(header_bytes == 0 ? 1 : header_bytes);
    if (copy == NULL)
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory for a header of %llu bytes",
                        (unsigned long long)header_bytes);
    memcpy(copy, header, header_bytes);
    return parse_owned(copy, header_bytes, file_size, out, view, err);
}

/* If the file has shrunk since it was opened, stock decides. */
static int read_header(fst_file *file, uint64_t offset, void *to, uint64_t bytes, fst_error *err) {
    int code = fst_file_read(file, offset, to, bytes, err);
    if (code == FST_E_TRUNCATED) code = err->code = FST_FALLBACK;
    return code;
}

/* The caller frees *header. The first read brings most headers whole. */
static int read_all(fst_file *file, char **header, uint64_t *header_bytes, fst_error *err) {
    unsigned char first[FIRST_BYTES];
    uint64_t size = file->info.size, bytes = 0, have = fst_min(size, sizeof first);
    if (size < LENGTH_BYTES) return fst_fail(err, FST_FALLBACK, 0, "%s: too short", file->path);
    int code = read_header(file, 0, first, have, err);
    if (code != FST_OK) return code;
    for (unsigned i = 0; i < LENGTH_BYTES; i++) bytes |= (uint64_t)first[i] << 8 * i;
    if (bytes > MAX_HEADER_BYTES || bytes > size - LENGTH_BYTES)
        return fst_fail(err, FST_FALLBACK, 0, "%s: header length %llu does not fit the file",
                        file->path, (unsigned long long)bytes);
    char *all = malloc(bytes == 0 ? 1 : bytes);
    if (all == NULL)
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "%s: no memory for a header of %llu bytes",
                        file->path, (unsigned long long)bytes);
    have = fst_min(have - LENGTH_BYTES, bytes);
    memcpy(all, first + LENGTH_BYTES, have);
    if (have < bytes) code = read_header(file, LENGTH_BYTES + have, all + have, bytes - have, err);
    if (code != FST_OK) {
        free(all);
        return code;
    }
    *header = all;
    *header_bytes = bytes;
    return FST_OK;
}

int fst_layout_read(fst_file *file, fst_layout *cached, fst_layout **out, fst_layout_view *view,
                    fst_error *err) {
    uint64_t header_bytes = 0;
    char *header = NULL;
    *out = NULL;
    /* Otherwise the kernel reads ahead and leaves a mark behind the header: see fst_arena.c. */
    if (file->fed == NULL) (void)FST_SYS->fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM);
    int code = read_all(file, &header, &header_bytes, err);
    if (file->fed == NULL) (void)FST_SYS->fadvise(file->fd, 0, 0, POSIX_FADV_NORMAL);
    if (code != FST_OK) return code;
    if (cached != NULL && cached->header_bytes == header_bytes &&
        cached->file_bytes == file->info.size &&
        memcmp(cached->header, header, header_bytes) == 0) {
        free(header);
        return FST_PENDING;
    }
    return parse_owned(header, header_bytes, file->info.size, out, view, err);
}

void fst_layout_release(fst_layout **owned) {
    fst_layout *layout = *owned;
    *owned = NULL;
    if (layout == NULL) return;
    free(layout->tensors);
    free(layout->dims);
    free(layout->names);
    free(layout->header);
    free(layout);
}
