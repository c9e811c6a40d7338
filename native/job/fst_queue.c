/* fst_queue.c - the list of jobs and what happens to a job in it; what a fork does to both. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "job/fst_queue.h"

fst_queue_state fst_queue = {.lock = PTHREAD_MUTEX_INITIALIZER,
                             .window = {.open = FST_WINDOW_FIRST}};

static pthread_once_t queue_once = PTHREAD_ONCE_INIT;

struct timespec fst_queue_deadline(int milliseconds) {
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

/* Only for jobs that are done: these hold no file and no arena any more. */
void fst_queue_free(fst_job *job) {
    free(job->segments);
    free(job);
}

void fst_queue_append(fst_job *job) {
    if (fst_queue.tail == NULL)
        fst_queue.head = job;
    else
        fst_queue.tail->next = job;
    fst_queue.tail = job;
    fst_queue.jobs++;
}

static void unlink_job(fst_job *job) {
    fst_job **link = &fst_queue.head, *previous = NULL;
    while (*link != NULL && *link != job) {
        previous = *link;
        link = &(*link)->next;
    }
    if (*link == NULL) return;
    *link = job->next;
    if (fst_queue.tail == job) fst_queue.tail = previous;
    fst_queue.jobs--;
}

void fst_queue_set_cursor(fst_job *job, uint64_t segment) {
    while (segment < job->count && job->segments[segment].bytes == 0) segment++;
    job->next_segment = segment;
    if (segment < job->count) job->next_offset = job->segments[segment].file_offset;
}

void fst_queue_fail(fst_job *job, int code, const fst_error *error) {
    if (job->result == FST_OK) {
        job->result = code;
        job->error = *error;
    }
    fst_queue_give_up_rest(job);
    if (!FST_KEEPS(FST_RULE_RELEASE) && job->arena != NULL) {
        fst_arena_unref(job->arena);
        job->arena = NULL;
    }
}

/* The job is done only after it has released its file and arena: the owner that waited for it then
 * holds counters only. A fork waits for jobs that release, but not for the deleter of adopted
 * memory: it is torch's and may need Python's lock, which the thread in os.fork() holds. */
void fst_queue_finish_if_over(fst_job *job) {
    if (job->done || job->finishing || job->chunks != NULL || fst_queue_has_chunk(job)) return;
    fst_file *file = job->file;
    fst_arena *arena = job->arena;
    int fd = job->direct_fd;
    bool drop = job->kind == JOB_READ && job->options.drop_cache && file != NULL;
    job->finishing = true;
    fst_queue.finishing++;
    fst_queue_unlock(); /* dropping caches and unmapping gigabytes take their time */
    if (drop)           /* what was cached before, and what was read around the chunks */
        fst_file_drop_cache(file);
    fst_gds_deregister(job->options.device, job->gds_handle);
    if (fd >= 0) close(fd);
    fst_file_unref(file);
    bool adopted = arena != NULL && arena->kind == FST_ARENA_ADOPTED;
    if (arena != NULL && !adopted) fst_arena_unref(arena);
    if (job->allocated != NULL) fst_gpu_give_event(job->options.device, job->allocated);
    fst_queue_lock();
    fst_queue.finishing--;
    job->file = NULL;
    job->arena = NULL;
    job->direct_fd = -1;
    job->gds_handle = job->allocated = NULL;
    if (adopted) {
        (void)pthread_cond_broadcast(&fst_queue.event); /* a fork may go on */
        fst_queue_unlock();
        fst_arena_unref(arena);
        fst_queue_lock();
    }
    unlink_job(job);
    job->stats.bytes_skipped = job->stats.bytes_total - job->stats.bytes_done;
    job->stats.done = 1;
    job->done = true;
    if (--job->refs == 0) fst_queue_free(job);
    (void)pthread_cond_broadcast(&fst_queue.event);
}

static bool goes_first(const fst_job *job, const fst_job *other) {
    if (job->kind == JOB_PREFETCH) return false;
    if (other->kind == JOB_PREFETCH) return true;
    /* What is waited for overtakes what is read ahead: a network gives little at a time. */
    if (fst_queue_is_fed(job) && fst_queue_is_fed(other) && job->wanted != other->wanted)
        return job->wanted;
    /* Jobs of one file go in the order of submission: a caller waits for the first tensors. So do
     * all uploads: the source of an upload that is done can be freed. */
    return job->file != other->file && job->reading < other->reading;
}

/* Whether one more worker may serve a job. Its number of threads bounds the calls for all fed files
 * together: each call takes memory. What is waited for may go beyond the window: it must not wait
 * for read-ahead to end. */
static bool has_room(const fst_job *job) {
    if (job->reading >= job->options.threads) return false;
    if (!fst_queue_is_fed(job)) return true;
    const fst_fed *fed = job->file->fed;
    const fst_window *window = &fst_queue.window;
    if (fed->calls >= fed->most || window->calls >= job->options.threads) return false;
    return window->calls < window->open || (job->wanted && job->reading < FST_WINDOW_FIRST);
}

/* Reads and uploads come first, since a caller waits for them; among them the one that the fewest
 * workers serve. Read-ahead follows in the order of submission, which is that of consumption. */
fst_job *fst_queue_next(void) {
    fst_job *best = NULL;
    for (fst_job *job = fst_queue.head; job != NULL; job = job->next) {
        if (!fst_queue_has_chunk(job) || !has_room(job)) continue;
        if (best == NULL || goes_first(job, best)) best = job;
    }
    return best;
}

void fst_queue_refuse_gds(fst_job *job, const fst_error *error) {
    if (job->options.mode != FST_READ_GDS) return; /* the first reason counts */
    job->options.mode = FST_READ_DIRECT_IF_COLD;
    job->stats.gds_refused = 1;
    (void)snprintf(job->stats.gds_note, sizeof job->stats.gds_note, "%.*s",
                   (int)sizeof job->stats.gds_note - 1, error->message);
}

/* ---- fork ---- */

static void before_fork(void) {
    fst_queue_lock();
    fst_queue.forking++;
    /* The device must not write into pages that the fork is about to share, and the child must
     * not keep what a finishing job is about to release. */
    while (fst_queue.in_flight_direct > 0 || fst_queue.finishing > 0)
        (void)pthread_cond_wait(&fst_queue.event, &fst_queue.lock);
}

static void after_fork_parent(void) {
    fst_queue.forking--;
    (void)pthread_cond_broadcast(&fst_queue.work);
    (void)pthread_cond_broadcast(&fst_queue.event);
    fst_queue_unlock();
}

static void init_conditions(void) {
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&fst_queue.work, &attributes);
    (void)pthread_cond_init(&fst_queue.event, &attributes);
    (void)pthread_condattr_destroy(&attributes);
}

/* Only the forking thread exists in the child: workers are gone, and so are the jobs' owners. The
 * jobs end as cancelled and release what they held. */
static void after_fork_child(void) {
    (void)pthread_mutex_init(&fst_queue.lock, NULL); /* locked by this very thread, in the parent */
    init_conditions();
    fst_queue.forking = fst_queue.in_flight_direct = 0;
    fst_queue.window = (fst_window){.open = FST_WINDOW_FIRST};
    fst_queue_lock();
    while (fst_queue.head != NULL) {
        fst_job *job = fst_queue.head;
        job->chunks = NULL;
        job->reading = 0;
        if (job->file != NULL && job->file->fed != NULL) job->file->fed->calls = 0;
        job->finishing = false;            /* the thread that released its adopted memory is gone */
        if (job->options.device != NULL) { /* only the parent may free these */
            job->arena = NULL;
            job->allocated = job->gds_handle = NULL;
        }
        atomic_store(&job->stop, true);
        if (job->result == FST_OK)
            job->result = fst_fail(&job->error, FST_E_CANCELLED, ECANCELED,
                                   "the process forked during the load");
        fst_queue_give_up_rest(job);
        fst_queue_finish_if_over(job);
    }
    fst_queue_unlock();
}

static void init_queue(void) {
    init_conditions();
    (void)pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

void fst_queue_prepare(void) { (void)pthread_once(&queue_once, init_queue); }
