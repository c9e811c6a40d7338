/* fst_pool.c - worker threads, and what a fork does to them. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "base/fst_sys.h"
#include "job/fst_pool.h"

#define IDLE_SECONDS 10
/* Address space only. Libraries' thread-local data is in it, and Python code that feeds a file. */
#define STACK_BYTES (2u << 20)

fst_pool_state fst_pool;

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

/* ---- workers ---- */

static bool start_worker(void);

static void *worker_main(void *argument) {
    fst_worker *worker = argument;
    fst_queue_lock();
    fst_numa_start(&worker->place); /* with the lock, as who looks at the workers has it */
    fst_pool.idle--;
    for (;;) {
        fst_chunk_retire(worker, worker->in_flight == FST_IN_FLIGHT);
        fst_job *job = fst_queue.forking > 0 ? NULL : fst_queue_next();
        if (job != NULL && fst_queue_is_fed(job) && worker->in_flight > 0) {
            fst_chunk_retire(worker, true); /* not after a callback, which may take long */
            continue;
        }
        if (job != NULL) {
            /* Another worker is there for what comes during a callback. */
            if (fst_queue_is_fed(job) && fst_pool.idle == 0) (void)start_worker();
            fst_chunk_run(job, worker);
            fst_queue_finish_if_over(job);
            (void)pthread_cond_broadcast(&fst_queue.event);
            continue;
        }
        if (worker->in_flight > 0) {
            fst_chunk_retire(worker, true);
            continue;
        }
        /* During a fork no chunk was looked for: there may be one. */
        if (fst_pool.ending > 0 && fst_queue.forking == 0) break;
        struct timespec until = fst_queue_deadline(IDLE_SECONDS * 1000);
        fst_pool.idle++;
        int timed_out = pthread_cond_timedwait(&fst_queue.work, &fst_queue.lock, &until);
        fst_pool.idle--;
        if (timed_out == ETIMEDOUT && fst_queue_next() == NULL && fst_queue.forking == 0) break;
    }
    fst_pages_unmap(&worker->slot);
    worker->alive = false;
    fst_pool.threads--;
    (void)pthread_cond_broadcast(&fst_queue.event);
    fst_queue_unlock();
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
    if (code == EINVAL) { /* the program's thread-local data need more than that */
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
    fst_pool.idle++; /* until it looks for work */
    return true;
}

int fst_pool_grow(int wanted) {
    while (fst_pool.threads < wanted && start_worker()) {
    }
    return fst_pool.threads;
}

/* ---- fork ---- */

/* In the child no worker exists. */
static void after_fork_child(void) {
    fst_pool.threads = fst_pool.ending = fst_pool.idle = 0;
    for (int i = 0; i < FST_MAX_THREADS; i++) {
        fst_pool.workers[i].alive = false;
        fst_pool.workers[i].in_flight = 0;
        fst_pages_unmap(&fst_pool.workers[i].slot);
    }
}

static void init_pool(void) {
    fst_queue_prepare(); /* whose handler takes the lock that guards the pool, too */
    (void)pthread_atfork(NULL, NULL, after_fork_child);
}

void fst_pool_prepare(void) { (void)pthread_once(&pool_once, init_pool); }

void fst_pool_stop(void) {
    fst_pool_prepare();
    fst_queue_lock();
    fst_pool.ending++;
    (void)pthread_cond_broadcast(&fst_queue.work);
    while (fst_pool.threads > 0) (void)pthread_cond_wait(&fst_queue.event, &fst_queue.lock);
    fst_pool.ending--;
    fst_queue_unlock();
}
