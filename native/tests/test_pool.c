/* test_pool.c - jobs of many threads, cancelling, forking, shutting down.
 *
 * No case depends on timing: where an order matters, a gate in the system-call table holds
 * the workers inside a call until the case lets them go on.
 */
#include "test.h"

#include <pthread.h>
#include <sys/wait.h>
#include <time.h>

#include "fst_sys.h"

enum { CHUNK = 64 << 10, CHUNKS = 16, BYTES = CHUNK * CHUNKS };

static bool direct_works;

/* ---- the gate ---- */

enum { OPEN = INT_MAX, ENTRIES = 256, AHEAD_FD = -1 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int allowed; /* calls that may go on */
    int inside;  /* calls waiting */
    int passed;
    int entered;
    int fds[ENTRIES]; /* who entered, in order; AHEAD_FD: read-ahead of a map */
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static const fst_sys_table *real_calls;
static fst_sys_table gated_calls;

static void gate_pass(int fd) {
    (void)pthread_mutex_lock(&gate.lock);
    if (gate.entered < ENTRIES) gate.fds[gate.entered] = fd;
    gate.entered++;
    gate.inside++;
    (void)pthread_cond_broadcast(&gate.changed);
    while (gate.allowed == 0) (void)pthread_cond_wait(&gate.changed, &gate.lock);
    if (gate.allowed != OPEN) gate.allowed--;
    gate.inside--;
    gate.passed++;
    (void)pthread_cond_broadcast(&gate.changed);
    (void)pthread_mutex_unlock(&gate.lock);
}

static ssize_t gated_pread(int fd, void *to, size_t bytes, off_t offset) {
    gate_pass(fd);
    return pread(fd, to, bytes, offset);
}

static ssize_t gated_preadv(int fd, const struct iovec *to, int count, off_t offset) {
    gate_pass(fd);
    return preadv(fd, to, count, offset);
}

static int gated_madvise(void *address, size_t bytes, int advice) {
    if (advice != 22) return 0; /* MADV_POPULATE_READ is what read-ahead waits in */
    gate_pass(AHEAD_FD);
    (void)address;
    (void)bytes;
    return 0;
}

/* Nothing tells what is cached, so read-ahead works on every chunk. */
static long long no_cachestat(int fd, unsigned long long offset, unsigned long long bytes) {
    (void)fd, (void)offset, (void)bytes;
    errno = ENOSYS;
    return -1;
}

static ssize_t no_preadv2(int fd, const struct iovec *to, int count, off_t offset, int flags) {
    (void)fd, (void)to, (void)count, (void)offset, (void)flags;
    errno = EOPNOTSUPP;
    return -1;
}

static int no_mincore(void *address, size_t bytes, unsigned char *out) {
    (void)address, (void)bytes, (void)out;
    errno = ENOSYS;
    return -1;
}

static int no_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                     void *argument) {
    (void)thread, (void)attributes, (void)start, (void)argument;
    return EAGAIN;
}

static void gate_install(bool threads) {
    gated_calls = *real_calls;
    gated_calls.pread = gated_pread;
    gated_calls.preadv = gated_preadv;
    gated_calls.madvise = gated_madvise;
    gated_calls.cachestat = no_cachestat;
    gated_calls.preadv2 = no_preadv2;
    gated_calls.mincore = no_mincore;
    if (!threads) gated_calls.pthread_create = no_thread;
    gate.allowed = gate.inside = gate.passed = gate.entered = 0;
    atomic_store(&fst_sys_in_force, &gated_calls);
}

static void gate_allow(int calls) {
    (void)pthread_mutex_lock(&gate.lock);
    gate.allowed = calls == OPEN ? OPEN : gate.allowed + calls;
    (void)pthread_cond_broadcast(&gate.changed);
    (void)pthread_mutex_unlock(&gate.lock);
}

static void gate_wait(int passed, int inside) { /* until at least so many */
    (void)pthread_mutex_lock(&gate.lock);
    while (gate.passed < passed || gate.inside < inside)
        (void)pthread_cond_wait(&gate.changed, &gate.lock);
    (void)pthread_mutex_unlock(&gate.lock);
}

static int gate_inside(void) {
    (void)pthread_mutex_lock(&gate.lock);
    int inside = gate.inside;
    (void)pthread_mutex_unlock(&gate.lock);
    return inside;
}

static void gate_remove(void) {
    gate_allow(OPEN);
    atomic_store(&fst_sys_in_force, real_calls);
}

static void nap(void) { /* to be polite in a loop, never to order anything */
    struct timespec pause = {0, 1000000};
    (void)nanosleep(&pause, NULL);
}

/* ---- loads ---- */

typedef struct load {
    test_file made;
    fst_file *file;
    fst_arena *arena;
    fst_job *job;
    int fd;
} load;

static load start_load(uint64_t salt, int mode, int threads) {
    load l = {.made = test_create(BYTES, salt)};
    fst_error err = {0};
    fst_file_info info;
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = {.struct_bytes = sizeof options,
                               .threads = threads,
                               .chunk_bytes = CHUNK,
                               .mode = mode};
    MUST(fst_file_open(l.made.path, &l.file, &info, &err) == FST_OK);
    l.fd = info.fd;
    MUST(fst_arena_alloc(BYTES, &l.arena, &err) == FST_OK);
    MUST(fst_job_read(l.file, l.arena, &all, 1, &options, &l.job, &err) == FST_OK);
    return l;
}

static load start_prefetch(uint64_t salt, int threads) {
    load l = {.made = test_create(BYTES, salt)};
    fst_error err = {0};
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = {.struct_bytes = sizeof options, .threads = threads, .chunk_bytes = CHUNK};
    l.file = test_open(&l.made);
    MUST(fst_arena_map(l.file, &l.arena, &err) == FST_OK);
    MUST(fst_job_prefetch(l.file, l.arena, &all, 1, &options, &l.job, &err) == FST_OK);
    return l;
}

static int wait_for(fst_job *job) {
    fst_error err = {0};
    int code;
    while ((code = fst_job_wait(job, 100, &err)) == FST_PENDING) {}
    CHECK(code == FST_OK || (err.code == code && err.message[0] != '\0'));
    return code;
}

static bool bytes_right(const load *l) {
    const unsigned char *bytes = fst_arena_data(l->arena);
    for (uint64_t i = 0; i < BYTES; i++)
        if (bytes[i] != test_byte(i, l->made.salt)) return false;
    return true;
}

static fst_job_stats stats_of(fst_job *job) {
    fst_job_stats stats;
    fst_job_get_stats(job, &stats);
    return stats;
}

static void end_load(load *l) {
    fst_job_release(l->job);
    fst_arena_release(l->arena);
    fst_file_release(l->file);
    test_remove(&l->made);
}

/* ---- one thing at a time ---- */

static void test_before_anything(void) {
    fst_pool_stats stats;
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.threads, 0);
    CHECK_EQ(stats.jobs, 0);
    fst_pool_shutdown();
    fst_job_cancel(NULL);
    fst_job_release(NULL);
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
    for (int mode = FST_READ_BUFFERED; mode <= (direct_works ? FST_READ_DIRECT : 0); mode++) {
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
    fst_job_release(l->job);
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
    fst_job_release(l.job);
    fst_arena_release(l.arena);
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

/* ---- fork ---- */

/* TSan's runtime supports no threads in the child of a process that had some. */
#ifdef __SANITIZE_THREAD__
enum { CHILD_MAY_LOAD = 0 };
#else
enum { CHILD_MAY_LOAD = 1 };
#endif

/* In the child: the parent's jobs have ended, a pool of its own works. Never returns. */
static void child_main(const load *parents, bool cancelled) {
    fst_pool_stats stats;
    (void)alarm(WATCHDOG_SECONDS);
    atomic_store(&fst_sys_in_force, real_calls);
    test_failures = 0;
    int code = wait_for(parents->job);
    CHECK(code == FST_E_CANCELLED || (!cancelled && code == FST_OK));
    if (code == FST_OK) CHECK(bytes_right(parents));
    CHECK_EQ(stats_of(parents->job).done, 1);
    fst_job_release(parents->job);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.threads, 0);
    CHECK_EQ(stats.jobs, 0);
    for (int mode = FST_READ_BUFFERED; CHILD_MAY_LOAD && mode <= FST_READ_DIRECT; mode++) {
        load own = start_load(7, mode, 2);
        CHECK_EQ(wait_for(own.job), FST_OK);
        CHECK(bytes_right(&own));
        end_load(&own);
    }
    fst_arena_release(parents->arena);
    fst_file_release(parents->file);
    fst_pool_shutdown();
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.arenas, 0);
    CHECK_EQ(stats.files, 0);
    _exit(test_failures > 0);
}

static void check_child(pid_t child) {
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

static void test_fork_during_reads(void) {
    gate_install(true);
    load l = start_load(1, FST_READ_BUFFERED, 2);
    gate_wait(0, 2);
    pid_t child = fork(); /* two reads are in flight */
    if (child == 0) child_main(&l, true);
    check_child(child); /* it did not need the parent to go on */
    gate_remove();
    CHECK_EQ(wait_for(l.job), FST_OK);
    CHECK(bytes_right(&l));
    end_load(&l);
}

static void test_fork_during_prefetch(void) {
    gate_install(true);
    load l = start_prefetch(1, 2);
    gate_wait(0, 2);
    pid_t child = fork();
    if (child == 0) child_main(&l, false);
    check_child(child);
    gate_remove();
    CHECK_EQ(wait_for(l.job), FST_OK);
    CHECK(bytes_right(&l));
    end_load(&l);
}

typedef struct forker {
    pthread_t thread;
    const load *parents;
    pid_t child;
    atomic_bool done;
} forker;

static void *fork_once(void *argument) {
    forker *f = argument;
    f->child = fork();
    if (f->child == 0) {
        CHECK_EQ(gate_inside(), 0); /* no direct read was in flight */
        child_main(f->parents, false);
    }
    atomic_store(&f->done, true);
    return NULL;
}

/* Direct reads are let through one by one until both forks have happened. */
static void test_forks_at_once(void) {
    forker forkers[2];
    gate_install(true);
    load l = start_load(1, FST_READ_DIRECT, 2);
    gate_wait(0, 2);
    for (int i = 0; i < 2; i++) {
        forkers[i] = (forker){.parents = &l};
        MUST(pthread_create(&forkers[i].thread, NULL, fork_once, &forkers[i]) == 0);
    }
    while (!atomic_load(&forkers[0].done) || !atomic_load(&forkers[1].done)) {
        gate_allow(1);
        nap();
    }
    gate_remove();
    for (int i = 0; i < 2; i++) {
        MUST(pthread_join(forkers[i].thread, NULL) == 0);
        check_child(forkers[i].child);
    }
    CHECK_EQ(wait_for(l.job), FST_OK);
    CHECK(bytes_right(&l));
    end_load(&l);
}

typedef struct helper {
    pthread_t thread;
    const load *l;
    forker *f;
} helper;

/* Waits as Python does: after each chunk it needs a lock that the forking thread holds. */
static void *wait_like_python(void *argument) {
    helper *h = argument;
    fst_error err = {0};
    int code = fst_job_wait(h->l->job, 100, &err);
    while (!atomic_load(&h->f->done)) nap();
    CHECK_EQ(code, FST_PENDING);
    CHECK_EQ(wait_for(h->l->job), FST_OK);
    return NULL;
}

/* No worker could be started: the waiter reads itself, and a fork waits for its chunk. */
static void test_fork_beside_helper(void) {
    gate_install(false);
    load l = start_load(1, FST_READ_DIRECT, 2);
    forker f = {.parents = &l};
    helper h = {.l = &l, .f = &f};
    MUST(pthread_create(&h.thread, NULL, wait_like_python, &h) == 0);
    gate_wait(0, 1);
    MUST(pthread_create(&f.thread, NULL, fork_once, &f) == 0);
    for (int i = 0; i < 20; i++) nap(); /* most likely the fork waits by now; either is right */
    gate_remove();
    MUST(pthread_join(h.thread, NULL) == 0 && pthread_join(f.thread, NULL) == 0);
    check_child(f.child);
    CHECK(bytes_right(&l));
    end_load(&l);
}

/* ---- everything at once ---- */

enum { USERS = 6, ROUNDS = 12 };

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
    fst_segment parts[2] = {{0, BYTES / 2 - 77, 0}, {BYTES / 2 + 50, BYTES / 2 - 50, BYTES / 2 + 50}};
    fst_job_options options = {.struct_bytes = sizeof options,
                               .threads = (int32_t)(1 + test_below(&u->random, 4)),
                               .chunk_bytes = CHUNK << test_below(&u->random, 3),
                               .mode = (int32_t)test_below(&u->random, 2),
                               .drop_cache = test_below(&u->random, 4) == 0};
    load l = {.made = *u->made};
    bool ahead = test_below(&u->random, 3) == 0;
    MUST((ahead ? fst_arena_map(file, &l.arena, &err) : fst_arena_alloc(BYTES, &l.arena, &err)) == FST_OK);
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
                if (bytes[parts[i].arena_offset + k] != test_byte(parts[i].file_offset + k, u->made->salt)) {
                    CHECK(!"wrong byte");
                    break;
                }
    }
    if (what == 1) MUST(pthread_join(canceller, NULL) == 0);
    bool map_first = test_below(&u->random, 2) == 0;
    if (map_first) fst_arena_release(l.arena);
    fst_job_release(l.job);
    if (!map_first) fst_arena_release(l.arena);
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
        fst_file_release(file);
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
    real_calls = FST_SYS;
    direct_works = test_direct_works();
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
    if (!CHILD_MAY_LOAD) test_skip("loads in forked children", "TSan cannot");
    RUN(test_fork_during_reads);
    RUN(test_fork_during_prefetch);
    if (direct_works) {
        RUN(test_forks_at_once);
        RUN(test_fork_beside_helper);
    } else {
        test_skip("forks beside direct reads", "the file system of TMPDIR takes no O_DIRECT");
    }
    return test_result();
}
