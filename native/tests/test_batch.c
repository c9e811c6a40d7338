/* test_batch.c - DLPack structs: what they say, and that memory goes with the last deleter. */
#include "test.h"

#include <pthread.h>

#include "tensor/fst_batch.h"

static fst_dl_dtype table[FST_DTYPES];

static void fill_table(void) {
    for (int i = 0; i < FST_DTYPES; i++) table[i] = (fst_dl_dtype){2, 32, 0, 1};
    table[FST_F8_E8M0].as_bytes = 1;
    table[FST_U64].known = 0;
}

static fst_layout *parse(const char *header, uint64_t data, fst_layout_view *view) {
    fst_layout *layout = NULL;
    fst_error err = {0};
    size_t bytes = strlen(header);
    MUST(fst_layout_parse(header, bytes, 8 + bytes + data, &layout, view, &err) == FST_OK);
    return layout;
}

static const char shapes[] =
    "{\"scalar\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
    "\"empty\":{\"dtype\":\"F32\",\"shape\":[3,0,5],\"data_offsets\":[4,4]},"
    "\"plain\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[4,28]},"
    "\"bytes\":{\"dtype\":\"F8_E8M0\",\"shape\":[2,2],\"data_offsets\":[28,32]},"
    "\"byte\":{\"dtype\":\"F8_E8M0\",\"shape\":[],\"data_offsets\":[32,33]}}";

static int64_t at(const int64_t *array, int i) { return array[i]; }

static void check_shapes(fst_batch *batch, const unsigned char *data) {
    const dl_tensor *t = &fst_batch_versioned(batch, 0)->tensor;
    CHECK(t->ndim == 0 && t->data == data + 16 && t->byte_offset == 0);
    CHECK(t->device.type == DL_CPU && t->dtype.code == 2 && t->dtype.bits == 32 &&
          t->dtype.lanes == 1);
    t = &fst_batch_versioned(batch, 1)->tensor;
    CHECK(t->ndim == 3 && at(t->shape, 1) == 0);
    CHECK(at(t->strides, 0) == 5 && at(t->strides, 1) == 5 && at(t->strides, 2) == 1);
    t = &fst_batch_plain(batch, 2)->tensor;
    CHECK(t->ndim == 2 && at(t->shape, 0) == 2 && at(t->shape, 1) == 3);
    CHECK(at(t->strides, 0) == 3 && at(t->strides, 1) == 1 && t->data == data + 16 + 4);
    for (uint64_t i = 3; i < 5; i++) { /* no DLPack dtype: bytes, to be viewed */
        t = &fst_batch_versioned(batch, i)->tensor;
        CHECK(t->ndim == 1 && at(t->shape, 0) == (i == 3 ? 4 : 1) && at(t->strides, 0) == 1);
        CHECK(t->dtype.code == DL_UINT && t->dtype.bits == 8);
    }
    CHECK(fst_batch_versioned(batch, 0)->version.major == 1);
}

static void test_described(void) {
    fst_layout_view view;
    fst_layout *layout = parse(shapes, 33, &view);
    fst_error err = {0};
    fst_arena *arena = NULL;
    fst_batch *batch = NULL;
    fst_pool_stats stats;
    MUST(fst_arena_alloc(16 + 33, &arena, &err) == FST_OK);
    MUST(fst_batch_create(arena, &view, NULL, 5, NULL, 16, table, &batch, &err) == FST_OK);
    check_shapes(batch, fst_arena_data(arena));
    fst_layout_release(&layout); /* copied */
    unsigned char *data = fst_arena_data(arena);
    fst_arena_release(&arena);
    for (uint64_t i = 0; i < 5; i++) { /* through either struct */
        dl_managed *plain = fst_batch_plain(batch, i);
        dl_managed_versioned *versioned = fst_batch_versioned(batch, i);
        CHECK(plain->manager == batch && versioned->manager == batch);
        if (i % 2)
            plain->deleter(plain);
        else
            versioned->deleter(versioned);
        CHECK((i % 2 ? plain->manager : versioned->manager) == NULL);
    }
    data[48] = 1; /* the creator's hold is left */
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.arenas, 1);
    fst_batch_drop(batch, 0);
    fst_batch_drop(batch, 1);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.arenas, 0);
}

static void test_chosen(void) {
    static const uint64_t which[] = {2, 0, 2}, offsets[] = {40, 8, 0};
    fst_layout_view view;
    fst_layout *layout = parse(shapes, 33, &view);
    fst_error err = {0};
    fst_arena *arena = NULL;
    fst_batch *batch = NULL;
    MUST(fst_arena_alloc(64, &arena, &err) == FST_OK);
    unsigned char *data = fst_arena_data(arena);
    MUST(fst_batch_create(arena, &view, which, 3, offsets, 999, table, &batch, &err) == FST_OK);
    CHECK(fst_batch_plain(batch, 0)->tensor.data == data + 40);
    CHECK(fst_batch_plain(batch, 1)->tensor.data == data + 8);
    CHECK(fst_batch_plain(batch, 1)->tensor.ndim == 0);
    CHECK(fst_batch_plain(batch, 2)->tensor.data == data);
    fst_batch_drop(batch, 4);
    fst_arena_release(&arena);
    fst_layout_release(&layout);
}

static void test_refused(void) {
    fst_layout_view view;
    fst_layout *layout = parse(shapes, 33, &view);
    fst_error err = {0};
    fst_arena *arena = NULL;
    fst_batch *batch = NULL;
    uint64_t which = 5, offset = 0;
    MUST(fst_arena_alloc(33, &arena, &err) == FST_OK);
#define CREATE(which, count, offsets, base)                                                        \
    fst_batch_create(arena, &view, which, count, offsets, base, table, &batch, &err)
    CHECK_EQ(CREATE(NULL, 0, NULL, 0), FST_E_INVALID);
    CHECK_EQ(CREATE(NULL, 6, NULL, 0), FST_E_INVALID);
    CHECK_EQ(CREATE(&which, 1, &offset, 0), FST_E_INVALID);
    which = UINT64_MAX;
    CHECK_EQ(CREATE(&which, 1, &offset, 0), FST_E_INVALID);
    CHECK_EQ(CREATE(NULL, 5, NULL, 1), FST_E_INVALID); /* the last one, by a byte */
    which = 2;
    static const uint64_t outside[] = {10, 33, 34, UINT64_MAX, UINT64_MAX - 23};
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++)
        CHECK_EQ(CREATE(&which, 1, &outside[i], 0), FST_E_INVALID);
    which = 1, offset = 33; /* empty at the very end */
    CHECK_EQ(CREATE(&which, 1, &offset, 0), FST_OK);
    fst_batch_drop(batch, 2);
    offset = 34;
    CHECK_EQ(CREATE(&which, 1, &offset, 0), FST_E_INVALID);
#undef CREATE
    CHECK(batch == NULL);
    fst_arena_release(&arena);
    fst_layout_release(&layout);
}

static void test_unknown_dtype(void) {
    fst_layout_view view;
    fst_layout *layout =
        parse("{\"a\":{\"dtype\":\"U64\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, &view);
    fst_error err = {0};
    fst_arena *arena = NULL;
    fst_batch *batch = NULL;
    MUST(fst_arena_alloc(8, &arena, &err) == FST_OK);
    CHECK_EQ(fst_batch_create(arena, &view, NULL, 1, NULL, 0, table, &batch, &err), FST_FALLBACK);
    CHECK(batch == NULL);
    fst_arena_release(&arena);
    fst_layout_release(&layout);
}

/* ---- deleters on many threads ---- */

enum {
    THREADS = 6,
    TENSORS = 3000
};

typedef struct share {
    pthread_t thread;
    fst_batch *batch;
    uint64_t first;
} share;

static void *delete_share(void *argument) {
    share *s = argument;
    for (uint64_t i = s->first; i < TENSORS; i += THREADS) {
        dl_managed_versioned *managed = fst_batch_versioned(s->batch, i);
        unsigned char *data = managed->tensor.data;
        data[0]++; /* alive until its own deleter has run */
        managed->deleter(managed);
    }
    return NULL;
}

static fst_layout *many_tensors(fst_layout_view *view) {
    static char header[TENSORS * 80];
    size_t bytes = 1;
    header[0] = '{';
    for (int i = 0; i < TENSORS; i++)
        bytes +=
            (size_t)snprintf(header + bytes, sizeof header - bytes,
                             "\"%d\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[%d,%d]}%s",
                             i, 2 * i, 2 * i + 2, i == TENSORS - 1 ? "}" : ",");
    return parse(header, 2 * TENSORS, view);
}

static void test_threads(void) {
    fst_layout_view view;
    fst_layout *layout = many_tensors(&view);
    for (int round = 0; round < 5; round++) {
        share shares[THREADS];
        fst_error err = {0};
        fst_arena *arena = NULL;
        fst_batch *batch = NULL;
        MUST(fst_arena_alloc(2 * TENSORS, &arena, &err) == FST_OK);
        MUST(fst_batch_create(arena, &view, NULL, TENSORS, NULL, 0, table, &batch, &err) == FST_OK);
        fst_arena_release(&arena);
        for (uint64_t i = 0; i < THREADS; i++) {
            shares[i] = (share){.batch = batch, .first = i};
            MUST(pthread_create(&shares[i].thread, NULL, delete_share, &shares[i]) == 0);
        }
        fst_batch_drop(batch, 1);
        for (int i = 0; i < THREADS; i++) MUST(pthread_join(shares[i].thread, NULL) == 0);
        fst_pool_stats stats;
        fst_pool_get_stats(&stats);
        CHECK_EQ(stats.arenas, 0);
    }
    fst_layout_release(&layout);
}

/* Several batches over one arena: it goes with the last of them. */
static void test_shared_arena(void) {
    fst_layout_view view;
    fst_layout *layout = parse(shapes, 33, &view);
    fst_error err = {0};
    fst_arena *arena = NULL;
    fst_batch *batches[3];
    fst_pool_stats stats;
    MUST(fst_arena_alloc(33, &arena, &err) == FST_OK);
    unsigned char *data = fst_arena_data(arena);
    for (int i = 0; i < 3; i++)
        MUST(fst_batch_create(arena, &view, NULL, 5, NULL, 0, table, &batches[i], &err) == FST_OK);
    fst_arena_release(&arena);
    for (int i = 0; i < 3; i++) {
        fst_batch_drop(batches[i], 5);
        data[0]++;
        fst_pool_get_stats(&stats);
        CHECK_EQ(stats.arenas, 1);
        fst_batch_drop(batches[i], 1);
    }
    fst_layout_release(&layout);
}

int main(void) {
    fill_table();
    RUN(test_described);
    RUN(test_chosen);
    RUN(test_refused);
    RUN(test_unknown_dtype);
    RUN(test_threads);
    RUN(test_shared_arena);
    return test_result();
}
