/* test_fork.c - a fork in the middle of loads: the parent's go on, the child's have ended. */
#include "gate.h"

#include <sys/wait.h>

#include "tensor/fst_dlpack.h"

/* In the child: the parent's jobs have ended, a pool of its own works. Never returns. */
static void child_main(load *parents, bool cancelled) {
    fst_pool_stats stats;
    (void)alarm(WATCHDOG_SECONDS);
    atomic_store(&fst_sys_in_force, real_calls);
    test_failures = 0;
    int code = wait_for(parents->job);
    CHECK(code == FST_E_CANCELLED || (!cancelled && code == FST_OK));
    if (code == FST_OK) CHECK(bytes_right(parents));
    CHECK_EQ(stats_of(parents->job).done, 1);
    fst_job_release(&parents->job);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.threads, 0);
    CHECK_EQ(stats.jobs, 0);
    for (int mode = FST_READ_BUFFERED; !UNDER_TSAN && mode <= FST_READ_DIRECT; mode++) {
        load own = start_load(7, mode, 2);
        CHECK_EQ(wait_for(own.job), FST_OK);
        CHECK(bytes_right(&own));
        end_load(&own);
    }
    fst_arena_release(&parents->arena);
    fst_file_release(&parents->file);
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
    load *parents;
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

/* Memory whose deleter wants a lock, as torch's wants Python's. */
static struct {
    pthread_mutex_t python;
    dl_managed managed;
    int64_t bytes;
    atomic_int called, freed;
} adopted = {.python = PTHREAD_MUTEX_INITIALIZER, .bytes = BYTES};

static void want_python(dl_managed *self) {
    atomic_fetch_add(&adopted.called, 1);
    (void)pthread_mutex_lock(&adopted.python);
    free(self->tensor.data);
    (void)pthread_mutex_unlock(&adopted.python);
    atomic_fetch_add(&adopted.freed, 1);
}

/* A worker has the last hold on adopted memory, and the thread that forks holds the lock. */
static void test_fork_beside_deleter(void) {
    load l = {.made = test_create(BYTES, 1)};
    fst_error err = {0};
    fst_file_info info;
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = {.struct_bytes = sizeof options, .threads = 1, .chunk_bytes = CHUNK};
    adopted.managed.tensor = (dl_tensor){.data = malloc(BYTES),
                                         .device = {1, 0},
                                         .ndim = 1,
                                         .dtype = {1, 8, 1},
                                         .shape = &adopted.bytes};
    adopted.managed.deleter = want_python;
    MUST(adopted.managed.tensor.data != NULL);
    gate_install(true);
    MUST(fst_file_open(l.made.path, &l.file, &info, &err) == FST_OK);
    MUST(fst_arena_adopt((uintptr_t)&adopted.managed, &l.arena, &err) == FST_OK);
    MUST(fst_job_read(l.file, l.arena, &all, 1, &options, &l.job, &err) == FST_OK);
    gate_wait(0, 1);
    fst_arena_release(&l.arena);
    (void)pthread_mutex_lock(&adopted.python);
    gate_remove();
    while (atomic_load(&adopted.called) == 0) nap();
    pid_t child = fork();
    if (child == 0) _exit(0);
    check_child(child);
    (void)pthread_mutex_unlock(&adopted.python);
    (void)wait_for(l.job); /* it may have been cancelled: nobody wanted the bytes */
    while (atomic_load(&adopted.freed) == 0) nap();
    CHECK_EQ(adopted.called, 1);
    end_load(&l);
}

int main(void) {
    if (UNDER_TSAN) test_skip("loads in forked children", "TSan cannot");
    RUN(test_fork_during_reads);
    RUN(test_fork_during_prefetch);
    RUN(test_fork_beside_deleter);
    if (test_direct_works()) {
        RUN(test_forks_at_once);
        RUN(test_fork_beside_helper);
    } else {
        test_skip("forks beside direct reads", "the file system of TMPDIR takes no O_DIRECT");
    }
    return test_result();
}
