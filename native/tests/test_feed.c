/* test_feed.c - jobs on files that a callback feeds: who is asked for what and when, and letting go
 * while callbacks run.
 */
#include "device.h"
#include "gate.h"

#include <sys/wait.h>

#include "job/fst_queue.h"

enum {
    CANARY = 0xEE
};

typedef struct fed {
    test_file made; /* its bytes; there is no such file */
    fst_file *file;
    unsigned char *memory;
    fst_arena *arena;
    fst_job *job;
    fst_error err;
} fed;

static atomic_int running, most_running;

static int64_t give(void *context, uint64_t offset, uint64_t bytes, void *into) {
    const test_file *made = context;
    int now = atomic_fetch_add(&running, 1) + 1;
    for (int most = atomic_load(&most_running); now > most;)
        if (atomic_compare_exchange_strong(&most_running, &most, now)) break;
    gate_pass((int)(offset / CHUNK));
    memcpy(into, content_of(made) + offset, bytes);
    (void)atomic_fetch_sub(&running, 1);
    return (int64_t)bytes;
}

static void close_gate(void) {
    gate.allowed = gate.inside = gate.passed = gate.entered = 0;
    atomic_store(&most_running, 0);
    fst_pool_shutdown(); /* nothing runs: the window may be set */
    fst_queue.window = (fst_window){.open = FST_WINDOW_FIRST};
}

/* `context` outlives the case, as calls that begin late need it. */
static fst_file *feed(int32_t most) {
    static test_file context = {.size = BYTES, .salt = 5};
    fst_file *file = NULL;
    fst_file_info info;
    fst_error err = {0};
    (void)content_of(&context);
    MUST(fst_file_feed("fed", BYTES, most, give, &context, &file, &info, &err) == FST_OK);
    return file;
}

static fst_job_options options_of(int threads) {
    return (fst_job_options){
        .struct_bytes = sizeof(fst_job_options), .threads = threads, .chunk_bytes = CHUNK};
}

static fst_job *start_part(fst_file *file, fst_arena *arena, int chunk, int chunks, int threads) {
    fst_job *job = NULL;
    fst_error err = {0};
    fst_job_options options = options_of(threads);
    fst_segment some = {(uint64_t)chunk * CHUNK, (uint64_t)chunks * CHUNK, (uint64_t)chunk * CHUNK};
    MUST(fst_job_read(file, arena, &some, 1, &options, &job, &err) == FST_OK);
    return job;
}

/* For jobs beside another one that fills the same part of its memory. */
static fst_arena *memory_apart(void) {
    fst_arena *arena = NULL;
    fst_error err = {0};
    MUST(fst_arena_alloc(BYTES, &arena, &err) == FST_OK);
    return arena;
}

/* All of it, into memory of the caller's. */
static fed start_fed(int32_t most, int threads) {
    fed f = {.made = {.size = BYTES, .salt = 5}, .file = feed(most), .memory = malloc(BYTES)};
    MUST(f.memory != NULL);
    memset(f.memory, CANARY, BYTES);
    MUST(fst_arena_borrow(f.memory, BYTES, &f.arena, &f.err) == FST_OK);
    f.job = start_part(f.file, f.arena, 0, CHUNKS, threads);
    return f;
}

static bool untouched(const fed *f) {
    for (uint64_t i = 0; i < BYTES; i++)
        if (f->memory[i] != CANARY) return false;
    return true;
}

static bool fed_right(const fed *f) { return memcmp(f->memory, content_of(&f->made), BYTES) == 0; }

static void end_fed(fed *f) {
    fst_job_release(&f->job);
    fst_arena_release(&f->arena);
    fst_file_release(&f->file);
    free(f->memory);
    f->memory = NULL;
}

/* ---- letting go ---- */

static void test_release_does_not_wait(void) {
    close_gate();
    fed f = start_fed(8, 3);
    gate_wait(0, 3);
    fst_job_release(&f.job); /* the calls still run */
    CHECK_EQ(gate_inside(), 3);
    CHECK(untouched(&f));
    end_fed(&f); /* frees the memory */
    gate_allow(OPEN);
}

static void test_what_comes_late_is_dropped(void) {
    close_gate();
    fed f = start_fed(8, 3);
    gate_wait(0, 3);
    fst_job_release(&f.job);
    gate_allow(OPEN);
    fst_pool_shutdown(); /* nothing runs any more */
    CHECK_EQ(gate.entered, 3);
    CHECK(untouched(&f));
    end_fed(&f);
}

static void test_cancel(void) {
    close_gate();
    fed f = start_fed(8, 3);
    gate_wait(0, 3);
    fst_job_cancel(f.job);
    CHECK_EQ(wait_for(f.job), FST_E_CANCELLED); /* although the calls run on */
    CHECK_EQ(stats_of(f.job).done, 0);
    gate_allow(OPEN);
    while (!stats_of(f.job).done) nap();
    CHECK_EQ(wait_for(f.job), FST_E_CANCELLED);
    CHECK_EQ(stats_of(f.job).bytes_done, 0);
    CHECK(untouched(&f));
    end_fed(&f);
}

/* A failure is told at once, although other calls run on. */
static int64_t fail_second(void *context, uint64_t offset, uint64_t bytes, void *into) {
    if (offset == CHUNK) return -9;
    return give(context, offset, bytes, into);
}

static void test_failure_is_told_at_once(void) {
    static test_file context = {.size = BYTES, .salt = 5};
    fst_file_info info;
    close_gate();
    fed f = {.made = context, .memory = calloc(1, BYTES)};
    MUST(f.memory != NULL);
    MUST(fst_file_feed("fed", BYTES, 8, fail_second, &context, &f.file, &info, &f.err) == FST_OK);
    MUST(fst_arena_borrow(f.memory, BYTES, &f.arena, &f.err) == FST_OK);
    f.job = start_part(f.file, f.arena, 0, CHUNKS, 3);
    CHECK_EQ(wait_for(f.job), FST_E_FEED);
    fst_job_release(&f.job);
    CHECK_EQ(gate.passed, 0);
    end_fed(&f);
    gate_allow(OPEN);
}

/* At any moment: while calls run, while what they brought is copied, and after the end. */
static void test_release_at_any_moment(void) {
    uint64_t random = 17;
    close_gate();
    gate_allow(OPEN);
    for (int i = 0; i < (UNDER_TSAN ? 50 : 400); i++) {
        fed f = start_fed(8, 4);
        for (uint64_t spins = test_below(&random, 20000); spins > 0; spins--)
            (void)atomic_load(&running);
        fst_job_release(&f.job);
        memset(f.memory, CANARY, BYTES); /* a late write would be a race */
        if (i % 8 == 0) fst_pool_shutdown();
        CHECK(untouched(&f));
        end_fed(&f);
    }
}

/* The arena outlives the calls that fill it. */
static void test_release_of_the_engines_memory(void) {
    fst_error err = {0};
    fst_arena *arena = NULL;
    close_gate();
    fst_file *file = feed(8);
    MUST(fst_arena_alloc(BYTES, &arena, &err) == FST_OK);
    fst_job *job = start_part(file, arena, 0, CHUNKS, 3);
    gate_wait(0, 3);
    fst_job_release(&job);
    fst_arena_release(&arena);
    fst_file_release(&file);
    gate_allow(OPEN);
}

/* ---- who is asked for what ---- */

static void test_in_order(void) {
    close_gate();
    fed f = start_fed(1, 8);
    gate_allow(OPEN);
    CHECK_EQ(wait_for(f.job), FST_OK);
    CHECK(fed_right(&f));
    CHECK_EQ(gate.entered, CHUNKS);
    for (int i = 0; i < CHUNKS; i++) CHECK_EQ(gate.fds[i], i);
    CHECK_EQ(atomic_load(&most_running), 1);
    end_fed(&f);
}

static void test_never_more_than_most(void) {
    close_gate();
    fst_arena *apart = memory_apart();
    fed f = start_fed(2, 8);
    fst_job *wanted = start_part(f.file, apart, 8, 1, 8);
    CHECK_EQ(fst_job_wait(wanted, 0, &f.err), FST_PENDING);
    gate_wait(0, 2);
    gate_allow(OPEN);
    CHECK_EQ(wait_for(wanted), FST_OK);
    CHECK_EQ(wait_for(f.job), FST_OK);
    CHECK_EQ(atomic_load(&most_running), 2);
    fst_job_release(&wanted);
    fst_arena_release(&apart);
    end_fed(&f);
}

/* What somebody waits for goes before the rest of what is read ahead. */
static void test_wanted_overtakes(void) {
    close_gate();
    fst_arena *apart = memory_apart();
    fed f = start_fed(1, 4);
    gate_wait(0, 1);
    fst_job *wanted = start_part(f.file, apart, 8, 1, 4);
    fst_job *other = start_part(f.file, apart, 9, 1, 4);
    CHECK_EQ(fst_job_wait(wanted, 0, &f.err), FST_PENDING);
    gate_allow(OPEN);
    CHECK_EQ(wait_for(wanted), FST_OK);
    CHECK_EQ(wait_for(other), FST_OK);
    CHECK_EQ(wait_for(f.job), FST_OK);
    CHECK_EQ(gate.fds[0], 0);
    CHECK_EQ(gate.fds[1], 8);
    fst_job_release(&wanted);
    fst_job_release(&other);
    fst_arena_release(&apart);
    end_fed(&f);
}

/* It does not wait for a call to end, even if as many run as the link is thought to need. */
static void test_wanted_goes_beyond_the_window(void) {
    close_gate();
    fst_arena *apart = memory_apart();
    fed f = start_fed(16, 16);
    gate_wait(0, FST_WINDOW_FIRST);
    fst_job *wanted = start_part(f.file, apart, 8, 1, 16);
    CHECK_EQ(fst_job_wait(wanted, 0, &f.err), FST_PENDING);
    gate_wait(0, FST_WINDOW_FIRST + 1);
    CHECK_EQ(gate.fds[FST_WINDOW_FIRST], 8);
    gate_allow(OPEN);
    CHECK_EQ(wait_for(wanted), FST_OK);
    CHECK_EQ(wait_for(f.job), FST_OK);
    CHECK(fed_right(&f));
    fst_job_release(&wanted);
    fst_arena_release(&apart);
    end_fed(&f);
}

/* Workers that wait for a network leave others for files. */
static void test_local_load_beside(void) {
    close_gate();
    fed f = start_fed(4, 4);
    gate_wait(0, 4);
    load l = start_load(1, FST_READ_BUFFERED, 2);
    CHECK_EQ(wait_for(l.job), FST_OK);
    CHECK(bytes_right(&l));
    CHECK_EQ(gate_inside(), 4);
    end_load(&l);
    gate_allow(OPEN);
    CHECK_EQ(wait_for(f.job), FST_OK);
    CHECK(fed_right(&f));
    end_fed(&f);
}

/* ---- a fork ---- */

static void child_main(fed *parents) { /* never returns */
    fst_pool_stats stats;
    (void)alarm(WATCHDOG_SECONDS);
    test_failures = 0;
    (void)pthread_mutex_init(&gate.lock, NULL);
    (void)pthread_cond_init(&gate.changed, NULL);
    gate.allowed = OPEN;
    CHECK_EQ(wait_for(parents->job), FST_E_CANCELLED);
    fst_job_release(&parents->job);
    CHECK(untouched(parents));
    if (!UNDER_TSAN) { /* calls of the parent's are none of the child's */
        fst_job *own = start_part(parents->file, parents->arena, 0, CHUNKS, 4);
        CHECK_EQ(wait_for(own), FST_OK);
        CHECK(fed_right(parents));
        fst_job_release(&own);
    }
    end_fed(parents);
    fst_pool_shutdown();
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.fed_files, 0);
    _exit(test_failures > 0);
}

static void test_fork(void) {
    int status = -1;
    close_gate();
    fed f = start_fed(2, 2);
    gate_wait(0, 2);
    pid_t child = fork();
    if (child == 0) child_main(&f);
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    gate_allow(OPEN);
    CHECK_EQ(wait_for(f.job), FST_OK);
    CHECK(fed_right(&f));
    end_fed(&f);
}

/* ---- to a device ---- */

static void test_to_device(void) {
    uint64_t random = 23;
    test_file made = {.size = BYTES, .salt = 5};
    for (int i = 0; i < 10; i++) {
        fst_segment segments[40];
        uint64_t count = 0, at = 100 + test_below(&random, 200), to = 50;
        close_gate();
        gate_allow(OPEN);
        for (; count < 40 && at < BYTES; count++) {
            uint64_t bytes = test_below(&random, i % 2 ? 300 : 90000);
            if (bytes > BYTES - at) bytes = BYTES - at;
            segments[count] = (fst_segment){at, bytes, to};
            at += bytes + test_below(&random, 3) * test_below(&random, 70000);
            to += bytes + 300 + test_below(&random, 300); /* no padding, which would be zeros */
        }
        fst_error err = {0};
        fst_job *job = NULL;
        fst_file *file = feed(8);
        fst_arena *arena = device_arena(to, 0);
        fst_job_options options = options_to(0, FST_READ_BUFFERED);
        MUST(fst_job_read(file, arena, segments, count, &options, &job, &err) == FST_OK);
        CHECK_EQ(job_result(job, &err), FST_OK);
        FAKE(fake_drain)();
        CHECK(segments_right(&made, arena, segments, count, BYTES));
        CHECK(rest_untouched(arena, segments, count));
        fst_job_release(&job);
        fst_arena_release(&arena);
        fst_file_release(&file);
    }
}

/* The same worker waits for the next bytes by then. */
static void test_landed_on_device(void) {
    fst_error err = {0};
    fst_job *job = NULL;
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    options.threads = 1;
    close_gate();
    fst_file *file = feed(8);
    fst_arena *arena = device_arena(BYTES, 0);
    MUST(fst_job_read(file, arena, &all, 1, &options, &job, &err) == FST_OK);
    gate_allow(1);
    while (fst_job_wait_until(job, CHUNK, 100, &err) == FST_PENDING) {
    }
    gate_wait(1, 1);
    gate_allow(OPEN);
    CHECK_EQ(job_result(job, &err), FST_OK);
    fst_job_release(&job);
    fst_arena_release(&arena);
    fst_file_release(&file);
}

static void test_release_to_device(void) {
    fst_error err = {0};
    fst_job *job = NULL;
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    close_gate();
    fst_file *file = feed(8);
    fst_arena *arena = device_arena(BYTES, 0);
    MUST(fst_job_read(file, arena, &all, 1, &options, &job, &err) == FST_OK);
    gate_wait(0, 3);
    gate_allow(2); /* some are copied by then, or not */
    fst_job_release(&job);
    CHECK(gate_inside() > 0);
    fst_arena_release(&arena);
    fst_file_release(&file);
    gate_allow(OPEN);
}

static void test_device_refuses_others(void) {
    fst_error err = {0};
    fst_job *job = NULL;
    fst_segment all = {0, BYTES, 0};
    fst_file *file = feed(8);
    fst_arena *arena = device_arena(BYTES, 0);
    for (int mode = FST_READ_DIRECT; mode <= FST_READ_GDS; mode++) {
        fst_job_options options = options_to(0, mode);
        CHECK_EQ(fst_job_read(file, arena, &all, 1, &options, &job, &err), FST_E_INVALID);
        CHECK(job == NULL);
    }
    fst_arena_release(&arena);
    fst_file_release(&file);
}

/* ---- the end of the process ---- */

static bool is_quiesced(fst_job *job) {
    fst_queue_lock();
    bool is = job->quiesced;
    fst_queue_unlock();
    return is;
}

static void *open_later(void *job) { /* when fst_feed_end waits */
    while (!is_quiesced(job)) nap();
    gate_allow(OPEN);
    return NULL;
}

/* The last case: nothing is fed afterwards. */
static void test_end(void) {
    pthread_t opener;
    close_gate();
    fed f = start_fed(8, 8);
    gate_wait(0, FST_WINDOW_FIRST);
    fed released = start_fed(2, 8);
    CHECK_EQ(fst_job_wait(released.job, 0, &f.err), FST_PENDING);
    gate_wait(0, 6);
    fst_job_release(&released.job);
    end_fed(&released);
    MUST(pthread_create(&opener, NULL, open_later, f.job) == 0);
    fst_feed_end();
    CHECK_EQ(atomic_load(&running), 0);
    CHECK_EQ(gate.entered, 6);
    CHECK_EQ(fst_job_wait(f.job, 20, &f.err), FST_PENDING); /* no error at the very end */
    CHECK(untouched(&f));
    MUST(pthread_join(opener, NULL) == 0);
    fst_job *late = start_part(f.file, f.arena, 0, 1, 1);
    CHECK_EQ(wait_for(late), FST_E_CANCELLED);
    CHECK_EQ(fst_file_read(f.file, 0, f.memory, 1, &f.err), FST_E_CANCELLED);
    CHECK_EQ(gate.entered, 6);
    fst_job_release(&late);
    fst_feed_end();
    end_fed(&f);
}

int main(void) {
    RUN(test_release_does_not_wait);
    RUN(test_what_comes_late_is_dropped);
    RUN(test_cancel);
    RUN(test_failure_is_told_at_once);
    RUN(test_release_at_any_moment);
    RUN(test_release_of_the_engines_memory);
    RUN(test_in_order);
    RUN(test_never_more_than_most);
    RUN(test_wanted_overtakes);
    RUN(test_wanted_goes_beyond_the_window);
    RUN(test_local_load_beside);
    RUN(test_fork);
    RUN_ON(test_to_device);
    RUN_ON(test_landed_on_device);
    RUN_ON(test_release_to_device);
    RUN_ON(test_device_refuses_others);
    RUN(test_end);
    return test_result();
}
