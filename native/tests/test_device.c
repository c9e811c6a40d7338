/* test_device.c - loads and uploads to a device give the file's bytes and write nowhere else:
 * every shape of plan, every way to read, many at once, and waiting for a part.
 */
#include "device.h"
#include "plan.h"

#include <sys/mman.h>

static bool direct_works;

/* ---- every shape ---- */

enum {
    UPLOAD = -1 /* in place of a way to read: the same bytes from memory */
};

typedef struct planned {
    const test_file *made;
    plan p;
    fst_arena *arena;
    fst_job *job;
    unsigned char *memory; /* of an upload: where the file's offset 0 would be */
    void *map;
    size_t map_bytes;
} planned;

/* The file's bytes in memory, at an odd address. Only pages that hold a segment can be read. */
static void make_source(planned *l) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), skip = 1 + l->made->size % 100;
    l->map_bytes = l->made->size + skip + page;
    l->map = mmap(NULL, l->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(l->map != MAP_FAILED);
    l->memory = (unsigned char *)l->map + skip;
    memcpy(l->memory, content_of(l->made), l->made->size);
    MUST(mprotect(l->map, l->map_bytes, PROT_NONE) == 0);
    for (uint64_t i = 0; i < l->p.count; i++) {
        const fst_segment *s = &l->p.segments[i];
        uint64_t first = fst_align_down(skip + s->file_offset, page);
        uint64_t end = skip + s->file_offset + s->bytes;
        if (s->bytes > 0) MUST(mprotect((char *)l->map + first, end - first, PROT_READ) == 0);
    }
}

static int start_upload(planned *l, const fst_job_options *options, fst_error *err) {
    make_source(l);
    fst_job_options given = *options;
    given.mode = 0;
    plan p = {.segments = calloc(l->p.count + 1, sizeof *p.segments)};
    MUST(p.segments != NULL);
    for (uint64_t i = 0; i < l->p.count; i++) {
        p.segments[i] = l->p.segments[i];
        p.segments[i].file_offset += (uintptr_t)l->memory;
    }
    int code = fst_job_upload(l->arena, p.segments, l->p.count, &given, &l->job, err);
    free_plan(&p);
    return code;
}

static planned start_plan(const test_file *made, plan p, const fst_job_options *options) {
    planned l = {.made = made, .p = p};
    fst_error err = {0};
    fst_file *file = test_open(made);
    l.arena = device_arena(p.arena_bytes, options->device->ordinal);
    int code = options->mode == UPLOAD
                   ? start_upload(&l, options, &err)
                   : fst_job_read(file, l.arena, p.segments, p.count, options, &l.job, &err);
    if (!CHECK_EQ(code, FST_OK)) (void)fprintf(stderr, "    %s\n", err.message);
    fst_file_release(&file); /* the job holds it */
    return l;
}

static void check_plan(const planned *l, int code) {
    const plan *p = &l->p;
    CHECK_EQ(code, FST_OK);
    CHECK(segments_right(l->made, l->arena, p->segments, p->count, UINT64_MAX));
    FAKE(fake_drain)();
    CHECK(segments_right(l->made, l->arena, p->segments, p->count, UINT64_MAX));
    CHECK(rest_untouched(l->arena, p->segments, p->count));
}

static void end_plan(planned *l) {
    fst_job_release(&l->job);
    fst_arena_release(&l->arena);
    free_plan(&l->p);
    if (l->map != NULL) MUST(munmap(l->map, l->map_bytes) == 0); /* nobody reads it now */
}

static void load_plan(const test_file *made, plan p, const fst_job_options *options) {
    fst_error err = {0};
    fst_job_stats stats;
    fst_pool_stats before, after;
    fst_pool_get_stats(&before);
    planned l = start_plan(made, p, options);
    check_plan(&l, job_result(l.job, &err));
    fst_job_get_stats(l.job, &stats);
    fst_pool_get_stats(&after);
    bool upload = options->mode == UPLOAD;
    CHECK_EQ(after.bytes_copied - before.bytes_copied, p.bytes);
    CHECK_EQ(after.bytes_uploaded - before.bytes_uploaded, upload ? p.bytes : 0);
    CHECK_EQ(after.bytes_buffered + after.bytes_direct - before.bytes_buffered -
                 before.bytes_direct,
             upload ? 0 : p.bytes);
    CHECK_EQ(stats.bytes_done, p.bytes);
    CHECK_EQ(stats.direct_errno, 0);
    if (options->mode == FST_READ_DIRECT) CHECK_EQ(stats.bytes_direct, p.bytes);
    if (options->mode == FST_READ_BUFFERED) CHECK_EQ(stats.bytes_direct, 0);
    end_plan(&l);
}

static fst_job_options random_options(uint64_t *random) {
    static const uint64_t chunks[] = {64 << 10, (64 << 10) + 1, 100000, 256 << 10, 4 << 20};
    static const uint64_t limits[] = {0, 64 << 10, 300000, 1 << 20, NO_LIMIT};
    static const int modes[] = {FST_READ_BUFFERED, UPLOAD, FST_READ_DIRECT,
                                FST_READ_DIRECT_IF_COLD};
    fst_job_options options = options_to((int)test_below(random, DEVICES), FST_READ_BUFFERED);
    options.chunk_bytes = chunks[test_below(random, 5)];
    options.pinned_bytes = limits[test_below(random, 5)];
    options.threads = (int32_t)(1 + test_below(random, 6));
    options.mode = modes[test_below(random, direct_works ? 4 : 2)];
    if (options.mode != UPLOAD)
        options.drop_cache = test_below(random, 3) == 0; /* the next one is cold */
    return options;
}

static void check_shapes(int mode) {
    uint64_t random = 7 + (uint64_t)mode;
    test_file made = test_create((1 << 20) + 777, 3);
    FAKE(fake_mode)(mode, 5);
    for (int i = 0; i < (UNDER_TSAN ? 12 : 40); i++) {
        fst_job_options options = random_options(&random);
        load_plan(&made, random_plan(made.size, &random), &options);
        if (test_below(&random, 8) == 0) fst_pool_shutdown();
    }
    test_remove(&made);
}

static void test_shapes_late(void) { check_shapes(FAKE_LATE_MODE); }

static void test_shapes_random(void) { check_shapes(FAKE_RANDOM_MODE); }

/* Files that end anywhere in a block, read to their last byte. */
static void test_tails(void) {
    static const uint64_t sizes[] = {1, 511, 513, 4095, 4096, 4097, 65535, 65537, 131073};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        test_file made = test_create(sizes[i], i);
        for (int mode = UPLOAD; mode <= (direct_works ? FST_READ_DIRECT : 0); mode++) {
            fst_job_options options = options_to(0, mode);
            load_plan(&made, whole_plan(made.size), &options);
        }
        test_remove(&made);
    }
}

static plan copy_of(const plan *p) {
    plan copy = *p;
    copy.segments = malloc(p->count * sizeof *p->segments);
    MUST(copy.segments != NULL);
    memcpy(copy.segments, p->segments, p->count * sizeof *p->segments);
    return copy;
}

/* Thousands of tensors of a few bytes, with gaps and without, at every alignment. */
static void test_many_small(void) {
    enum {
        COUNT = 4000
    };
    uint64_t random = 77, at = 3;
    plan p = {.segments = calloc(COUNT, sizeof *p.segments), .count = COUNT};
    MUST(p.segments != NULL);
    for (uint64_t i = 0; i < COUNT; i++) {
        uint64_t bytes = test_below(&random, 90);
        p.segments[i] = (fst_segment){at, bytes, 0};
        p.bytes += bytes;
        at += bytes + (test_below(&random, 3) == 0 ? test_below(&random, 40) : 0);
    }
    place(&p, &random);
    test_file made = test_create(at, 6);
    for (int mode = UPLOAD; mode <= FST_READ_BUFFERED; mode++) {
        fst_job_options options = options_to(0, mode);
        options.pinned_bytes = 2 * SLOT_BYTES;
        load_plan(&made, copy_of(&p), &options);
    }
    free_plan(&p);
    test_remove(&made);
}

/* Neighbours in the file, of odd sizes, at the aligned places that a planner gives them. */
static plan padded_plan(uint64_t largest, uint64_t *random) {
    enum {
        COUNT = 500
    };
    plan p = {.segments = calloc(COUNT, sizeof *p.segments), .count = COUNT};
    MUST(p.segments != NULL);
    for (uint64_t i = 0; i < COUNT; i++) {
        uint64_t bytes = test_below(random, largest + 1);
        p.segments[i] = (fst_segment){p.bytes, bytes, p.arena_bytes};
        p.bytes += bytes;
        p.arena_bytes = fst_align_up(p.arena_bytes + bytes, 256);
    }
    return p;
}

static uint64_t copies(void) {
    return FAKE(fake_calls)(device_kind == FST_GPU_CUDA ? "cuMemcpyHtoDAsync_v2"
                                                        : "hipMemcpyHtoDAsync");
}

/* One copy a chunk, with clean padding: a chunk ends where its slot is full, or at a block. */
static void test_padded(void) {
    static const uint64_t largest[] = {1, 256, 257, 4000};
    uint64_t random = 9;
    for (size_t i = 0; i < sizeof largest / sizeof *largest; i++) {
        plan p = padded_plan(largest[i], &random);
        test_file made = test_create(p.bytes, 6);
        for (int mode = UPLOAD; mode <= FST_READ_BUFFERED; mode++) {
            fst_job_options options = options_to(0, mode);
            uint64_t before = copies();
            load_plan(&made, copy_of(&p), &options);
            CHECK(copies() - before <= p.arena_bytes / (SLOT_BYTES - 4096) + 1);
        }
        for (int mode = FST_READ_DIRECT; direct_works && mode <= FST_READ_DIRECT_IF_COLD; mode++) {
            fst_job_options options = options_to(0, mode);
            load_plan(&made, copy_of(&p), &options);
        }
        test_remove(&made);
        free_plan(&p);
    }
}

/* A read that ends anywhere goes on at the right place of the slot. */
static void test_padded_in_parts(void) {
    static const uint64_t cuts[] = {1, 100, 777, 60000};
    uint64_t random = 10;
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        plan p = padded_plan(cuts[i] == 1 ? 30 : 700, &random);
        test_file made = test_create(p.bytes, 6);
        fst_job_options options = options_to(0, FST_READ_BUFFERED);
        CHECK_EQ(fst_fault_set("preadv", 1, INT_MAX, 0, cuts[i]), 0);
        load_plan(&made, p, &options);
        CHECK(fst_fault_calls("preadv") > p.bytes / 60001);
        fst_fault_clear();
        test_remove(&made);
    }
}

static void test_nothing_to_read(void) {
    test_file made = test_create(100, 1);
    for (int mode = UPLOAD; mode <= FST_READ_BUFFERED; mode++) {
        fst_job_options options = options_to(0, mode);
        load_plan(&made, whole_plan(0), &options); /* one empty segment */
        plan none = whole_plan(0), at_end = whole_plan(0);
        none.count = 0;
        load_plan(&made, none, &options);
        at_end.segments[0].file_offset = 100;
        load_plan(&made, at_end, &options);
    }
    CHECK_EQ(FAKE(fake_copied_bytes)(), 0);
    test_remove(&made);
}

/* ---- waiting for a part ---- */

/* What was waited for is right at once, with no help from pending work. */
static void walk(const planned *l, uint64_t *random) {
    fst_error err = {0};
    for (uint64_t at = 0; at < l->made->size; at += 1 + test_below(random, 200000)) {
        int code;
        uint64_t place = at + (uintptr_t)l->memory; /* of a read: the offset */
        while ((code = fst_job_wait_until(l->job, place, 1000, &err)) == FST_PENDING) {
        }
        CHECK_EQ(code, FST_OK);
        CHECK(segments_right(l->made, l->arena, l->p.segments, l->p.count, at));
    }
}

static void test_wait_until(void) {
    uint64_t random = 21;
    test_file made = test_create(1 << 20, 3);
    for (int i = 0; i < (UNDER_TSAN ? 6 : 16); i++) {
        FAKE(fake_mode)(i % 2 == 0 ? FAKE_LATE_MODE : FAKE_RANDOM_MODE, (uint64_t)i);
        fst_job_options options = random_options(&random);
        planned l = start_plan(&made, random_plan(made.size, &random), &options);
        fst_error err = {0};
        walk(&l, &random);
        check_plan(&l, job_result(l.job, &err));
        end_plan(&l);
    }
    test_remove(&made);
}

/* ---- everything at once ---- */

enum {
    USERS = 4,
    ROUNDS = UNDER_TSAN ? 5 : 12,
    FILES = 2
};

typedef struct user {
    pthread_t thread;
    uint64_t random;
    const test_file *made;
} user;

static void use_once(user *u) {
    fst_error err = {0};
    const test_file *made = &u->made[test_below(&u->random, FILES)];
    fst_job_options options = random_options(&u->random);
    planned l = start_plan(made, random_plan(made->size, &u->random), &options);
    uint64_t what = test_below(&u->random, 4);
    if (what == 0) fst_job_cancel(l.job);
    if (what < 3) { /* else: released at once */
        int code = job_result(l.job, &err);
        CHECK(code == FST_OK || (what == 0 && code == FST_E_CANCELLED));
        if (code == FST_OK)
            CHECK(segments_right(made, l.arena, l.p.segments, l.p.count, UINT64_MAX));
    }
    if (what == 1) { /* whose arena goes first */
        fst_arena_release(&l.arena);
        l.arena = NULL;
    }
    end_plan(&l);
}

static void *use_much(void *argument) {
    user *u = argument;
    for (int i = 0; i < ROUNDS; i++) {
        use_once(u);
        if (test_below(&u->random, 8) == 0) fst_pool_shutdown();
    }
    return NULL;
}

static void check_users(int mode) {
    user users[USERS];
    test_file made[FILES] = {test_create(500000, 4), test_create(1 << 20, 5)};
    FAKE(fake_mode)(mode, 11);
    for (uint64_t i = 0; i < USERS; i++) {
        users[i] = (user){.random = 1000 + i, .made = made};
        MUST(pthread_create(&users[i].thread, NULL, use_much, &users[i]) == 0);
    }
    for (int i = 0; i < USERS; i++) MUST(pthread_join(users[i].thread, NULL) == 0);
    for (int i = 0; i < FILES; i++) test_remove(&made[i]);
}

static void test_users_late(void) { check_users(FAKE_LATE_MODE); }

static void test_users_random(void) { check_users(FAKE_RANDOM_MODE); }

int main(void) {
    direct_works = test_direct_works();
    if (!direct_works) test_skip("O_DIRECT", "the file system of TMPDIR does not take it");
    for (device_kind = FST_GPU_CUDA; device_kind <= FST_GPU_HIP; device_kind++) {
        RUN_ON(test_shapes_late);
        RUN_ON(test_shapes_random);
        RUN_ON(test_tails);
        RUN_ON(test_many_small);
        RUN_ON(test_padded);
        RUN_ON(test_padded_in_parts);
        RUN_ON(test_nothing_to_read);
        RUN_ON(test_wait_until);
        RUN_ON(test_users_late);
        RUN_ON(test_users_random);
    }
    return test_result();
}
