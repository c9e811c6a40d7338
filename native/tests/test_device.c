/* test_device.c - loads to a device give the file's bytes and write nowhere else: every shape
 * of plan, every way to read, many at once, and waiting for a part.
 */
#include "device.h"
#include "plan.h"

static bool direct_works;

/* ---- every shape ---- */

typedef struct planned {
    const test_file *made;
    plan p;
    fst_arena *arena;
    fst_job *job;
} planned;

static planned start_plan(const test_file *made, plan p, const fst_job_options *options) {
    planned l = {.made = made, .p = p};
    fst_error err = {0};
    fst_file *file = test_open(made);
    l.arena = device_arena(p.arena_bytes, options->device->ordinal);
    int code = fst_job_read(file, l.arena, p.segments, p.count, options, &l.job, &err);
    if (!CHECK_EQ(code, FST_OK)) (void)fprintf(stderr, "    %s\n", err.message);
    fst_file_release(file); /* the job holds it */
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
    fst_job_release(l->job);
    fst_arena_release(l->arena);
    free_plan(&l->p);
}

static void load_plan(const test_file *made, plan p, const fst_job_options *options) {
    fst_error err = {0};
    fst_job_stats stats;
    planned l = start_plan(made, p, options);
    check_plan(&l, job_result(l.job, &err));
    fst_job_get_stats(l.job, &stats);
    CHECK_EQ(stats.bytes_done, p.bytes);
    CHECK_EQ(stats.direct_errno, 0);
    if (options->mode == FST_READ_DIRECT) CHECK_EQ(stats.bytes_direct, p.bytes);
    if (options->mode == FST_READ_BUFFERED) CHECK_EQ(stats.bytes_direct, 0);
    end_plan(&l);
}

static fst_job_options random_options(uint64_t *random) {
    static const uint64_t chunks[] = {64 << 10, (64 << 10) + 1, 100000, 256 << 10, 4 << 20};
    static const uint64_t limits[] = {0, 64 << 10, 300000, 1 << 20, NO_LIMIT};
    static const int modes[] = {FST_READ_BUFFERED, FST_READ_DIRECT, FST_READ_DIRECT_IF_COLD};
    fst_job_options options = options_to((int)test_below(random, DEVICES), FST_READ_BUFFERED);
    options.chunk_bytes = chunks[test_below(random, 5)];
    options.pinned_bytes = limits[test_below(random, 5)];
    options.threads = (int32_t)(1 + test_below(random, 6));
    options.mode = modes[direct_works ? test_below(random, 3) : 0];
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
        for (int mode = FST_READ_BUFFERED; mode <= (direct_works ? FST_READ_DIRECT : 0); mode++) {
            fst_job_options options = options_to(0, mode);
            load_plan(&made, whole_plan(made.size), &options);
        }
        test_remove(&made);
    }
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
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    options.pinned_bytes = 2 * SLOT_BYTES;
    load_plan(&made, p, &options);
    test_remove(&made);
}

static void test_nothing_to_read(void) {
    test_file made = test_create(100, 1);
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    load_plan(&made, whole_plan(0), &options); /* one empty segment */
    plan none = whole_plan(0), at_end = whole_plan(0);
    none.count = 0;
    load_plan(&made, none, &options);
    at_end.segments[0].file_offset = 100;
    load_plan(&made, at_end, &options);
    CHECK_EQ(FAKE(fake_copied_bytes)(), 0);
    test_remove(&made);
}

/* ---- waiting for a part ---- */

/* What was waited for is right at once, with no help from pending work. */
static void walk(const planned *l, uint64_t *random) {
    fst_error err = {0};
    for (uint64_t at = 0; at < l->made->size; at += 1 + test_below(random, 200000)) {
        int code;
        while ((code = fst_job_wait_until(l->job, at, 1000, &err)) == FST_PENDING) {
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
        fst_arena_release(l.arena);
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
        RUN_ON(test_nothing_to_read);
        RUN_ON(test_wait_until);
        RUN_ON(test_users_late);
        RUN_ON(test_users_random);
    }
    return test_result();
}
