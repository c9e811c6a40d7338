/* test_pool.c - jobs of many threads: who is served, cancelling, letting go, shutting down. */
#include "gate.h"

/* ---- one thing at a time ---- */

static void test_before_anything(void) {
    fst_pool_stats stats;
    fst_job *none = NULL;
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.threads, 0);
    CHECK_EQ(stats.jobs, 0);
    fst_pool_shutdown();
    fst_job_cancel(none);
    fst_job_release(&none);
}

static void test_wait_times_out(void) {
    fst_error err = {0};
    gate_install(true);
    load l = start_load(1, FST_READ_BUFFERED, 2);
    gate_wait(0, 2);
    CHECK_EQ(fst_job_wait(l.job, 0, &err), FST_PENDING);
    CHECK_EQ(fst_job_wait(l.job, 20, &err), FST_PENDING);
    CHECK_EQ(stats_of(l.job).done, 0);
    gate_remove();
    CHECK_EQ(wait_for(l.job), FST_OK);
    CHECK_EQ(wait_for(l.job), FST_OK); /* again, and again */
    CHECK(bytes_right(&l));
    end_load(&l);
}

/* What is in flight lands, nothing new is begun. */
static void test_cancel(void) {
    gate_install(true);
    load l = start_load(1, FST_READ_BUFFERED, 2);
    gate_wait(0, 2);
    fst_job_cancel(l.job);
    fst_job_cancel(l.job);
    gate_remove();
    CHECK_EQ(wait_for(l.job), FST_E_CANCELLED);
    CHECK_EQ(gate.entered, 2);
    fst_job_stats stats = stats_of(l.job);
    CHECK(stats.done && stats.bytes_done <= 2 * CHUNK);
    CHECK_EQ(stats.bytes_done + stats.bytes_skipped, BYTES);
    end_load(&l);
}

static void test_cancel_finished(void) {
    load l = start_load(1, FST_READ_BUFFERED, 2);
    CHECK_EQ(wait_for(l.job), FST_OK);
    fst_job_cancel(l.job);
    CHECK_EQ(wait_for(l.job), FST_OK);
    end_load(&l);
}

/* EAGAIN is tried again for a second; a cancelled job does not wait for that. */
static void test_cancel_retries(void) {
    bool direct = test_direct_works();
    for (int mode = FST_READ_BUFFERED; mode <= (direct ? FST_READ_DIRECT : 0); mode++) {
        CHECK_EQ(fst_fault_set(mode ? "pread" : "preadv", 1, UINT64_MAX, EAGAIN, 0), 0);
        load l = start_load(1, mode, 2);
        while (fst_fault_calls(mode ? "pread" : "preadv") == 0) nap();
        fst_job_cancel(l.job);
        int code = wait_for(l.job);
        CHECK(code == FST_E_CANCELLED);
        fst_fault_clear();
        end_load(&l);
    }
}

static void *release_later(void *argument) {
    load *l = argument;
    fst_job_release(&l->job);
    l->job = NULL;
    CHECK_EQ(gate_inside(), 0); /* memory may be freed now: nobody writes to it */
    return NULL;
}

static void test_release_drains(void) {
    pthread_t thread;
    gate_install(true);
    load l = start_load(1, FST_READ_BUFFERED, 3);
    gate_wait(0, 3);
    MUST(pthread_create(&thread, NULL, release_later, &l) == 0);
    for (int i = 0; i < 20; i++) nap(); /* a release that does not drain would be back */
    gate_remove();
    MUST(pthread_join(thread, NULL) == 0);
    CHECK_EQ(gate.entered, 3);
    end_load(&l);
}

/* The owner is gone and so is the map's last user: read-ahead ends with what is in flight. */
static void test_abandoned_map(void) {
    fst_pool_stats stats;
    gate_install(true);
    load l = start_prefetch(1, 2);
    gate_wait(0, 2);
    fst_job_release(&l.job);
    fst_arena_release(&l.arena);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.arenas, 1); /* the job still works in it */
    l.job = NULL;
    l.arena = NULL;
    gate_remove();
    fst_pool_shutdown();
    CHECK_EQ(gate.entered, 2);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.arenas, 0);
    end_load(&l);
}

static void test_cancelled_prefetch(void) {
    gate_install(true);
    load l = start_prefetch(1, 2);
    gate_wait(0, 2);
    fst_job_cancel(l.job);
    gate_remove();
    CHECK_EQ(wait_for(l.job), FST_OK); /* a wish was dropped, nothing failed */
    CHECK_EQ(stats_of(l.job).bytes_skipped, BYTES - 2 * CHUNK);
    CHECK(bytes_right(&l));
    end_load(&l);
}

/* ---- who is served ---- */

/* Two workers are busy with one job; the next chunk goes to the other. */
static void test_fair(void) {
    gate_install(true);
    load first = start_load(1, FST_READ_BUFFERED, 2);
    gate_wait(0, 2);
    load second = start_load(2, FST_READ_BUFFERED, 2);
    gate_allow(1);
    gate_wait(1, 2);
    CHECK_EQ(gate.fds[2], second.fd);
    gate_remove();
    CHECK_EQ(wait_for(first.job), FST_OK);
    CHECK_EQ(wait_for(second.job), FST_OK);
    CHECK(bytes_right(&first) && bytes_right(&second));
    end_load(&first);
    end_load(&second);
}

/* Somebody waits for a read, and nobody for read-ahead. */
static void test_reads_first(void) {
    gate_install(true);
    load ahead = start_prefetch(1, 1);
    gate_wait(0, 1);
    load read = start_load(2, FST_READ_BUFFERED, 1); /* one worker is enough: none is added */
    gate_allow(CHUNKS);
    gate_wait(CHUNKS, 1);
    for (int i = 1; i <= CHUNKS; i++) CHECK_EQ(gate.fds[i], read.fd);
    gate_remove();
    CHECK_EQ(wait_for(ahead.job), FST_OK);
    CHECK_EQ(wait_for(read.job), FST_OK);
    CHECK(bytes_right(&read));
    end_load(&ahead);
    end_load(&read);
}

static void test_no_threads(void) {
    gate_install(false);
    gate_allow(OPEN);
    load first = start_load(1, FST_READ_BUFFERED, 2), second = start_load(2, FST_READ_DIRECT, 2);
    load ahead = start_prefetch(3, 2);
    CHECK_EQ(stats_of(ahead.job).bytes_skipped, BYTES); /* nobody to do it */
    CHECK_EQ(wait_for(second.job), FST_OK);
    CHECK_EQ(wait_for(first.job), FST_OK);
    CHECK_EQ(wait_for(ahead.job), FST_OK);
    CHECK(bytes_right(&first) && bytes_right(&second));
    gate_remove();
    end_load(&first);
    end_load(&second);
    end_load(&ahead);
}

static void test_no_threads_released(void) {
    gate_install(false);
    load l = start_load(1, FST_READ_BUFFERED, 2); /* never waited for */
    end_load(&l);
    CHECK_EQ(gate.entered, 0);
    gate_remove();
}

/* ---- shutdown ---- */

static void *shut_down(void *unused) {
    (void)unused;
    fst_pool_shutdown();
    return NULL;
}

static void test_shutdown_waits(void) {
    pthread_t threads[2];
    fst_pool_stats stats;
    gate_install(true);
    load l = start_load(1, FST_READ_BUFFERED, 2);
    gate_wait(0, 2);
    for (int i = 0; i < 2; i++) MUST(pthread_create(&threads[i], NULL, shut_down, NULL) == 0);
    gate_remove();
    for (int i = 0; i < 2; i++) MUST(pthread_join(threads[i], NULL) == 0);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.threads, 0);
    CHECK_EQ(wait_for(l.job), FST_OK); /* finished before the workers left */
    CHECK(bytes_right(&l));
    end_load(&l);
    load again = start_load(2, FST_READ_BUFFERED, 2);
    CHECK_EQ(wait_for(again.job), FST_OK);
    CHECK(bytes_right(&again));
    end_load(&again);
}

/* ---- everything at once ---- */

enum {
    USERS = 6,
    ROUNDS = 12
};

typedef struct user {
    pthread_t thread;
    uint64_t random;
    const test_file *made;
} user;

static void *cancel_job(void *argument) {
    fst_job_cancel(argument);
    return NULL;
}

static void use_once(user *u, fst_file *file) {
    fst_error err = {0};
    fst_segment parts[2] = {{0, BYTES / 2 - 77, 0},
                            {BYTES / 2 + 50, BYTES / 2 - 50, BYTES / 2 + 50}};
    fst_job_options options = {.struct_bytes = sizeof options,
                               .threads = (int32_t)(1 + test_below(&u->random, 4)),
                               .chunk_bytes = (uint64_t)CHUNK << test_below(&u->random, 3),
                               .mode = (int32_t)test_below(&u->random, 2),
                               .drop_cache = test_below(&u->random, 4) == 0};
    load l = {.made = *u->made};
    bool ahead = test_below(&u->random, 3) == 0;
    MUST((ahead ? fst_arena_map(file, &l.arena, &err) : fst_arena_alloc(BYTES, &l.arena, &err)) ==
         FST_OK);
    int code = ahead ? fst_job_prefetch(file, l.arena, parts, 2, &options, &l.job, &err)
                     : fst_job_read(file, l.arena, parts, 2, &options, &l.job, &err);
    MUST(code == FST_OK);
    uint64_t what = test_below(&u->random, 4);
    pthread_t canceller;
    if (what == 1) MUST(pthread_create(&canceller, NULL, cancel_job, l.job) == 0);
    if (what == 2) fst_job_cancel(l.job);
    if (what < 3) { /* else: released at once */
        code = wait_for(l.job);
        CHECK(code == FST_OK || (what > 0 && code == FST_E_CANCELLED));
        CHECK_EQ(stats_of(l.job).done, 1);
        const unsigned char *bytes = fst_arena_data(l.arena);
        for (uint64_t i = 0; code == FST_OK && !ahead && i < 2; i++)
            for (uint64_t k = 0; k < parts[i].bytes; k++)
                if (bytes[parts[i].arena_offset + k] !=
                    test_byte(parts[i].file_offset + k, u->made->salt)) {
                    FAIL("a byte is wrong");
                    break;
                }
    }
    if (what == 1) MUST(pthread_join(canceller, NULL) == 0);
    bool map_first = test_below(&u->random, 2) == 0;
    if (map_first) fst_arena_release(&l.arena);
    fst_job_release(&l.job);
    if (!map_first) fst_arena_release(&l.arena);
}

static void *use_much(void *argument) {
    user *u = argument;
    for (int i = 0; i < ROUNDS; i++) {
        fst_file *file = test_open(u->made);
        use_once(u, file);
        if (test_below(&u->random, 8) == 0) fst_pool_shutdown();
        fst_pool_stats stats;
        fst_pool_get_stats(&stats);
        CHECK(stats.threads >= 0 && stats.threads <= 64);
        fst_file_release(&file);
    }
    return NULL;
}

static void test_many_users(void) {
    user users[USERS];
    test_file made = test_create(BYTES, 4);
    for (uint64_t i = 0; i < USERS; i++) {
        users[i] = (user){.random = 1000 + i, .made = &made};
        MUST(pthread_create(&users[i].thread, NULL, use_much, &users[i]) == 0);
    }
    for (int i = 0; i < USERS; i++) MUST(pthread_join(users[i].thread, NULL) == 0);
    test_remove(&made);
}

/* One chunk fails: the job ends with its error, and with nothing in flight. */
static void test_one_chunk_fails(void) {
    for (uint64_t call = 1; call <= CHUNKS; call += 5) {
        CHECK_EQ(fst_fault_set("preadv", call, 1, EIO, 0), 0);
        load l = start_load(1, FST_READ_BUFFERED, 4);
        CHECK_EQ(wait_for(l.job), FST_E_SYS);
        CHECK_EQ(stats_of(l.job).done, 1);
        fst_fault_clear();
        end_load(&l);
    }
}

int main(void) {
    RUN(test_before_anything);
    RUN(test_wait_times_out);
    RUN(test_cancel);
    RUN(test_cancel_finished);
    RUN(test_cancel_retries);
    RUN(test_release_drains);
    RUN(test_abandoned_map);
    RUN(test_cancelled_prefetch);
    RUN(test_fair);
    RUN(test_reads_first);
    RUN(test_no_threads);
    RUN(test_no_threads_released);
    RUN(test_shutdown_waits);
    RUN(test_one_chunk_fails);
    RUN(test_many_users);
    return test_result();
}
