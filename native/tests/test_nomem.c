/* test_nomem.c - each allocation of the engine fails once: FST_E_NOMEM, and nothing is left.
 *
 * run.sh links this program with --wrap for the three functions below.
 */
#include "test.h"

#include <pthread.h>

#include "fake_open.h"
#include "tensor/fst_batch.h"

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);

static uint64_t allocations, failing; /* failing: number of the one that fails, 0 for none */

static bool fails(void) { return ++allocations == failing; }

void *__wrap_malloc(size_t bytes) { return fails() ? NULL : __real_malloc(bytes); }

void *__wrap_calloc(size_t count, size_t bytes) {
    return fails() ? NULL : __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes) {
    return fails() ? NULL : __real_realloc(old, bytes);
}

/* ---- everything once; the first error ends it ---- */

enum {
    TENSORS = 200,
    DATA = 2 * TENSORS
}; /* enough for arrays to grow twice */

static char content[TENSORS * 80 + 8 + DATA];
static size_t header_bytes;

typedef struct everything {
    fst_file *file, *fed;
    fst_layout *parsed, *read;
    fst_arena *map, *memory, *borrowed;
    fst_batch *batch;
    fst_job *ahead, *load;
} everything;

static void make_content(void) {
    char *header = content + 8;
    size_t room = sizeof content - 8;
    size_t bytes = (size_t)snprintf(header, room, "{\"__metadata__\":{\"a\":\"b\"},");
    for (int i = TENSORS - 1; i >= 0; i--)
        bytes +=
            (size_t)snprintf(header + bytes, room - bytes,
                             "\"%d\":{\"dtype\":\"U8\",\"shape\":[2,1],\"data_offsets\":[%d,%d]}%s",
                             i, 2 * i, 2 * i + 2, i == 0 ? "}" : ",");
    for (unsigned i = 0; i < 8; i++) content[i] = (char)(bytes >> 8 * i & 0xFF);
    header_bytes = bytes;
}

static int64_t feed(void *context, uint64_t offset, uint64_t bytes, void *into) {
    (void)context, (void)offset, (void)into;
    return (int64_t)bytes;
}

static int steps(const test_file *made, everything *e, void *memory, fst_error *err) {
    static fst_dl_dtype table[FST_DTYPES];
    fst_file_info info;
    fst_layout_view view;
    fst_segment data = {8 + header_bytes, DATA, 0};
    fst_job_options options = {
        .struct_bytes = sizeof options, .threads = 1, .chunk_bytes = 64 << 10};
    int code;
    table[FST_U8] = (fst_dl_dtype){1, 8, 0, 1};
    if ((code = fst_file_open(made->path, &e->file, &info, err)) != FST_OK) return code;
    if ((code = fst_file_feed("fed", DATA, 1, feed, NULL, &e->fed, &info, err)) != FST_OK)
        return code;
    info.size = made->size;
    if ((code = fst_layout_read(e->file, NULL, &e->read, &view, err)) != FST_OK) return code;
    if ((code = fst_layout_parse(content + 8, header_bytes, info.size, &e->parsed, &view, err)) !=
        FST_OK)
        return code;
    if ((code = fst_arena_map(e->file, &e->map, err)) != FST_OK) return code;
    if ((code = fst_arena_alloc(DATA, &e->memory, err)) != FST_OK) return code;
    if ((code = fst_arena_borrow(memory, DATA, &e->borrowed, err)) != FST_OK) return code;
    if ((code = fst_batch_create(e->map, &view, NULL, view.count, NULL, view.data_begin, table,
                                 &e->batch, err)) != FST_OK)
        return code;
    if ((code = fst_job_prefetch(e->file, e->map, &data, 1, &options, &e->ahead, err)) != FST_OK)
        return code;
    return fst_job_read(e->file, e->borrowed, &data, 1, &options, &e->load, err);
}

static void release(everything *e) {
    fst_job_release(&e->ahead);
    fst_job_release(&e->load);
    if (e->batch != NULL) fst_batch_drop(e->batch, TENSORS + 1);
    fst_arena_release(&e->map);
    fst_arena_release(&e->memory);
    fst_arena_release(&e->borrowed);
    fst_layout_release(&e->parsed);
    fst_layout_release(&e->read);
    fst_file_release(&e->file);
    fst_file_release(&e->fed);
}

static void test_each_allocation(void) {
    char memory[DATA];
    make_content();
    test_file made = test_create_text(content, 8 + header_bytes + DATA);
    int code = FST_E_NOMEM;
    uint64_t n = 0;
    while (code == FST_E_NOMEM && n < 1000) {
        everything e = {0};
        fst_error err = {0};
        allocations = 0;
        failing = ++n;
        code = steps(&made, &e, memory, &err);
        failing = 0;
        CHECK_EQ(code, allocations < n ? FST_OK : FST_E_NOMEM);
        CHECK(code == FST_OK || (err.code == code && err.message[0] != '\0'));
        release(&e);
    }
    CHECK_EQ(code, FST_OK);
    CHECK(n > 20); /* all of them, that is */
    test_remove(&made);
}

/* ---- how many ---- */

/* Allocations to parse a header of so many tensors of one byte and one dimension. */
static uint64_t to_parse(unsigned tensors) {
    size_t room = 80 * (size_t)tensors + 2, bytes = 1;
    char *header = __real_malloc(room);
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    MUST(header != NULL);
    header[0] = '{';
    for (unsigned i = 0; i < tensors; i++)
        bytes += (size_t)snprintf(header + bytes, room - bytes,
                                  "\"%u\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":"
                                  "[%u,%u]}%s",
                                  i, i, i + 1, i + 1 == tensors ? "}" : ",");
    allocations = 0;
    MUST(fst_layout_parse(header, bytes, 8 + bytes + tensors, &layout, &view, &err) == FST_OK);
    uint64_t made = allocations;
    CHECK_EQ(view.count, tensors);
    fst_layout_release(&layout);
    free(header);
    return made;
}

/* A header is parsed in one pass with two arrays that double: none of its parts costs more. */
static void test_few_allocations_for_many_tensors(void) {
    uint64_t few = to_parse(1000), many = to_parse(64 * 1000);
    CHECK(few < 20);
    CHECK_EQ(many, few + UINT64_C(2) * 6);
}

/* What the driver gave for a device is given back. */
static void test_device_record(void) {
    fst_device *device = NULL;
    fake_counts live;
    int code = FST_E_NOMEM;
    uint64_t n = 0;
    while (code == FST_E_NOMEM && n < 100) {
        fst_error err = {0};
        allocations = 0;
        failing = ++n;
        code = fst_device_open(FST_GPU_CUDA, fake_path(), 0, &device, &err);
        failing = 0;
        FAKE(fake_live)(&live);
        CHECK_EQ(code, allocations < n ? FST_OK : FST_E_NOMEM);
        if (code != FST_OK) CHECK(live.streams == 0 && live.contexts == 0);
    }
    CHECK_EQ(code, FST_OK);
    CHECK(n > 3 && live.contexts == 1);
    CHECK_EQ(FAKE(fake_violations)(), 0);
}

int main(void) {
    RUN(test_each_allocation);
    RUN(test_few_allocations_for_many_tensors);
    RUN(test_device_record);
    return test_result();
}
