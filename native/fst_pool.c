/* fst_pool.c - worker threads, and what a fork does to them. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "fst_pool.h"
#include "fst_sys.h"

#define IDLE_SECONDS 10
#define STACK_BYTES (1u << 20) /* address space only; libraries' thread-local data is in it */

fst_pool_state fst_pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

struct timespec fst_deadline(int milliseconds) {
    struct timespec at;
    (void)clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += milliseconds / 1000;
    at.tv_nsec += (long)(milliseconds % 1000) * 1000000L;
    if (at.tv_nsec >= 1000000000L) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000L;
    }
    return at;
}

/* ---- workers ---- */

static void *worker_main(void *argument) {
    fst_worker *worker = argument;
    fst_numa_start(worker);
    fst_pool_lock();
    for (;;) {
        fst_chunk_retire(worker, worker->in_flight == FST_IN_FLIGHT);
        fst_job *job = fst_pool.forking > 0 ? NULL : fst_job_next();
        if (job != NULL) {
            fst_chunk_run(job, worker);
            fst_job_finish_if_over(job);
            (void)pthread_cond_broadcast(&fst_pool.event);
            continue;
        }
        if (worker->in_flight > 0) {
            fst_chunk_retire(worker, true);
            continue;
        }
        if (fst_pool.ending > 0 && fst_pool.forking == 0) break; /* a fork hides chunks from us */
        struct timespec until = fst_deadline(IDLE_SECONDS * 1000);
        int timed_out = pthread_cond_timedwait(&fst_pool.work, &fst_pool.lock, &until);
        if (timed_out == ETIMEDOUT && fst_job_next() == NULL && fst_pool.forking == 0) break;
    }
    fst_pages_unmap(&worker->slot);
    worker->alive = false;
    fst_pool.threads--;
    (void)pthread_cond_broadcast(&fst_pool.event);
    fst_pool_unlock();
    return NULL;
}

/* With the lock held. Workers are detached: nobody joins them, and they touch only the
 * pool, which is static. */
static bool start_worker(void) {
    int number = 0;
    while (number < FST_MAX_THREADS && fst_pool.workers[number].alive) number++;
    if (number == FST_MAX_THREADS) return false;
    fst_worker *worker = &fst_pool.workers[number];
    pthread_attr_t attributes;
    sigset_t all, before;
    if (pthread_attr_init(&attributes) != 0) return false;
    (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    (void)pthread_attr_setstacksize(&attributes, STACK_BYTES);
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    worker->alive = true;
    worker->number = number;
    worker->oldest = 0;
    int code = FST_SYS->pthread_create(&worker->thread, &attributes, worker_main, worker);
    if (code == EINVAL) { /* the program's thread-local data alone are more than that */
        (void)pthread_attr_destroy(&attributes);
        if (pthread_attr_init(&attributes) == 0) {
            (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
            code = FST_SYS->pthread_create(&worker->thread, &attributes, worker_main, worker);
        }
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    (void)pthread_attr_destroy(&attributes);
    if (code != 0) {
        worker->alive = false;
        return false;
    }
    fst_pool.threads++;
    return true;
}

void fst_pool_grow(int wanted) {
    while (fst_pool.threads < wanted && start_worker()) {
    }
}

/* ---- fork ---- */

static void before_fork(void) {
    fst_pool_lock();
    fst_pool.forking++;
    /* The device must not write into pages that the fork is about to share, and what a
     * finishing job lets go of must not stay behind in the child. */
    while (fst_pool.in_flight_direct > 0 || fst_pool.finishing > 0)
        (void)pthread_cond_wait(&fst_pool.event, &fst_pool.lock);
}

static void after_fork_parent(void) {
    fst_pool.forking--;
    (void)pthread_cond_broadcast(&fst_pool.work);
    (void)pthread_cond_broadcast(&fst_pool.event);
    fst_pool_unlock();
}

static void init_conditions(void) {
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&fst_pool.work, &attributes);
    (void)pthread_cond_init(&fst_pool.event, &attributes);
    (void)pthread_condattr_destroy(&attributes);
}

/* Only the forking thread exists in the child: workers are gone, and so is whoever
 * owned the jobs. They end as cancelled and let go of what they held. */
static void after_fork_child(void) {
    (void)pthread_mutex_init(&fst_pool.lock, NULL); /* locked by this very thread, in the parent */
    init_conditions();
    fst_pool.forking = fst_pool.ending = 0;
    fst_pool.threads = fst_pool.in_flight_direct = 0;
    for (int i = 0; i < FST_MAX_THREADS; i++) {
        fst_pool.workers[i].alive = false;
        fst_pool.workers[i].in_flight = 0;
        fst_pages_unmap(&fst_pool.workers[i].slot);
    }
    fst_pool_lock();
    while (fst_pool.head != NULL) {
        fst_job *job = fst_pool.head;
        job->chunks = NULL;
        job->reading = 0;
        if (job->options.device != NULL) { /* the driver's, and torch's to free: not from here */
            job->arena = NULL;
            job->allocated = job->gds_handle = NULL;
        }
        atomic_store(&job->stop, true);
        if (job->result == FST_OK)
            job->result = fst_fail(&job->error, FST_E_CANCELLED, ECANCELED,
                                   "the process forked during the load");
        fst_job_give_up_rest(job);
        fst_job_finish_if_over(job);
    }
    fst_pool_unlock();
}

static void init_pool(void) {
    init_conditions();
    (void)pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

void fst_pool_prepare(void) { (void)pthread_once(&pool_once, init_pool); }

void fst_pool_stop(void) {
    fst_pool_prepare();
    fst_pool_lock();
    fst_pool.ending++;
    (void)pthread_cond_broadcast(&fst_pool.work);
    while (fst_pool.threads > 0) (void)pthread_cond_wait(&fst_pool.event, &fst_pool.lock);
    fst_pool.ending--;
    fst_pool_unlock();
}
