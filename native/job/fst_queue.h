/* fst_queue.h - jobs, from submission until they hold neither file nor arena.
 *
 * One lock guards the list, every job in it but its `stop`, and the pool's threads. It is taken a
 * few times per chunk of megabytes, and never held across a system call that can block on storage.
 */
#pragma once

#include <pthread.h>
#include <time.h>

#include "device/fst_transfer.h"

enum job_kind {
    JOB_PREFETCH,
    JOB_READ,
    JOB_UPLOAD
};

typedef struct fst_chunk fst_chunk; /* see fst_chunk.h */

struct fst_job {
    unsigned refs; /* owner, queue */
    enum job_kind kind;
    atomic_bool stop;
    bool finishing; /* over, and releasing what only a running job needs */
    bool done;
    bool quiesced;    /* the process ends: waiting for this job returns FST_PENDING until then */
    bool inline_help; /* no thread could be started: the waiting caller does the work */
    bool fed;         /* of a fed file; also when that has been released */
    bool wanted;      /* of those: somebody has waited for it */
    int result;
    fst_error error;
    fst_file *file; /* NULL: an upload, whose file offsets are addresses */
    fst_arena *arena;
    int direct_fd;
    void *gds_handle; /* cuFile's, of direct_fd */
    void *allocated;  /* event behind the work that was pending on the arena's memory */
    int node;         /* the NUMA node of the device, or of the file's disk */
    fst_job_options options;
    fst_segment *segments;
    uint64_t count;
    uint64_t next_segment; /* cursor: where the next chunk begins */
    uint64_t next_offset;  /* file offset */
    int reading;           /* workers that are moving bytes for it */
    fst_chunk *chunks;     /* in flight */
    uint64_t headroom_at;  /* bytes_done at which to look at memory again */
    fst_job_stats stats;
    fst_job *next;
};

typedef struct fst_queue_state {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* a job was queued, or the pool must end */
    pthread_cond_t event; /* a chunk or a thread finished */
    fst_job *head, *tail;
    int jobs;
    int in_flight_direct; /* reads with O_DIRECT into memory that a fork would share */
    int finishing;        /* jobs releasing file and arena outside the lock */
    fst_window window;    /* of the callbacks of fed files */
    int forking;          /* how many forks are under way: no chunk is begun meanwhile */
} fst_queue_state;

extern fst_queue_state fst_queue;

/* Before the lock is taken for the first time, and without it: registers the handler that takes it
 * for a fork. */
void fst_queue_prepare(void);
static inline void fst_queue_lock(void) { (void)pthread_mutex_lock(&fst_queue.lock); }
static inline void fst_queue_unlock(void) { (void)pthread_mutex_unlock(&fst_queue.lock); }
struct timespec fst_queue_deadline(int milliseconds); /* from now, on the conditions' clock */

/* Frees a job that was never queued, or is done: such jobs hold no file and no arena. */
void fst_queue_free(fst_job *job);

/* ---- with the lock held ---- */

void fst_queue_append(fst_job *job);
static inline bool fst_queue_has_chunk(const fst_job *job) {
    return !job->done && job->next_segment < job->count;
}
static inline void fst_queue_give_up_rest(fst_job *job) { job->next_segment = job->count; }
/* Moves the cursor past empty segments to where the next chunk begins. */
void fst_queue_set_cursor(fst_job *job, uint64_t segment);
static inline bool fst_queue_is_fed(const fst_job *job) { return job->fed; }
/* The job that a worker should serve next, or NULL. */
fst_job *fst_queue_next(void);
/* The rest of the job goes through the ring instead of cuFile. */
void fst_queue_refuse_gds(fst_job *job, const fst_error *error);
void fst_queue_fail(fst_job *job, int code, const fst_error *error); /* the first failure counts */
/* If nothing of the job runs or will run, finishes it; lets go of the lock meanwhile. */
void fst_queue_finish_if_over(fst_job *job);
