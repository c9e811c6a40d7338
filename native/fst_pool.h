/* fst_pool.h - jobs, chunks and workers: what fst_job.c, fst_chunk.c and fst_pool.c share.
 *
 *   submit --> queue (FIFO of jobs, chunks claimed one at a time under the lock)
 *                |
 *     worker: claim chunk -> unlock -> move bytes -> lock -> account -> next
 *                |                     (to a device: start copies; account when they are over)
 *     last chunk accounted: job done, waiters woken, file and arena let go
 *
 * One lock for everything; it is taken a few times per chunk of megabytes. Workers start when
 * there is work, block all signals, and leave after IDLE_SECONDS without any, taking their
 * buffers with them. If no thread can be had, the waiting caller does the work.
 */
#ifndef FST_POOL_H
#define FST_POOL_H

#include <pthread.h>
#include <sched.h>

#include "fst_gpu.h"
#include "fst_internal.h"

#define FST_MAX_THREADS 64
#define FST_CHUNK_MIN (64u << 10)
#define FST_CHUNK_MAX (64u << 20)
#define FST_ANYWHERE (-1) /* no NUMA node in particular */
#define FST_IN_FLIGHT 2   /* chunks of one worker whose copies may be under way */

enum job_kind {
    JOB_PREFETCH,
    JOB_READ,
    JOB_UPLOAD
};

typedef struct fst_chunk { /* claimed and not yet accounted for; lives in its worker */
    fst_job *job;
    uint64_t begin;  /* file offset */
    uint64_t wanted; /* bytes; gaps read over do not count */
    bool direct;     /* read with O_DIRECT, in the end */
    bool gds;        /* or by cuFile */
    fst_transfer transfer;
    struct fst_chunk *next; /* of the job */
} fst_chunk;

struct fst_job {
    unsigned refs; /* owner, queue; under the lock like all below but stop */
    enum job_kind kind;
    atomic_bool stop;
    bool finishing; /* over, and letting go of what only running needed */
    bool done;
    bool quiesced;    /* the process ends: who waits for it waits for that */
    bool inline_help; /* no thread could be started: waiters work */
    int result;
    fst_error error;
    fst_file *file; /* NULL: an upload, whose file offsets are addresses */
    fst_arena *arena;
    int direct_fd;
    void *gds_handle; /* cuFile's, of direct_fd */
    void *allocated;  /* event: what was pending on the arena's memory is over */
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

typedef struct fst_worker {
    pthread_t thread;
    bool alive;
    int number;
    fst_pages slot; /* made when a chunk needs one, reused until the worker leaves */
    fst_chunk chunks[FST_IN_FLIGHT];
    int oldest, in_flight; /* of chunks: those whose copies were started */
    cpu_set_t allowed;     /* the CPUs it was started with */
    int node;              /* near which it was placed */
    bool placeable;        /* false for callers that help: their threads are their own */
} fst_worker;

typedef struct fst_pool_state {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* a job was queued, or the pool must end */
    pthread_cond_t event; /* a chunk or a thread finished */
    fst_job *head, *tail;
    fst_worker workers[FST_MAX_THREADS];
    int threads, jobs;
    int in_flight_direct; /* reads with O_DIRECT into memory that a fork would share */
    int finishing;        /* jobs letting go of file and arena outside the lock */
    int forking, ending;  /* how many forks and shutdowns are under way */
} fst_pool_state;

extern fst_pool_state fst_pool;

static inline void fst_pool_lock(void) { (void)pthread_mutex_lock(&fst_pool.lock); }
static inline void fst_pool_unlock(void) { (void)pthread_mutex_unlock(&fst_pool.lock); }
/* A thread starts if there are fewer than wanted. With the lock held. */
void fst_pool_grow(int wanted);
/* Waits for jobs in flight, then ends the workers. */
void fst_pool_stop(void);
struct timespec fst_deadline(int milliseconds); /* from now, on the pool's clock */

/* ---- fst_job.c; all with the lock held ---- */

static inline bool fst_job_has_chunk(const fst_job *job) {
    return !job->done && job->next_segment < job->count;
}
static inline void fst_job_give_up_rest(fst_job *job) { job->next_segment = job->count; }
/* Moves the cursor past empty segments to where the next chunk begins. */
void fst_job_set_cursor(fst_job *job, uint64_t segment);
/* The job that a worker should serve next, or NULL. */
fst_job *fst_job_next(void);
/* From here on the ring does what cuFile would not. */
void fst_job_refuse_gds(fst_job *job, const fst_error *error);
void fst_job_fail(fst_job *job, int code, const fst_error *error); /* the first failure counts */
/* If nothing of the job runs or will run, finishes it; lets go of the lock meanwhile. */
void fst_job_finish_if_over(fst_job *job);

/* ---- fst_numa.c ---- */

/* The node of the disk that a file is on; FST_ANYWHERE if that is not known, or makes no
 * difference. */
int fst_numa_of_file(const fst_file *file);
/* A worker says which CPUs it may use. */
void fst_numa_start(fst_worker *worker);
/* Moves the worker, which is the calling thread, near a node that so many workers shall serve. */
void fst_numa_place(fst_worker *worker, int node, int threads);
/* For tests: another folder than /sys tells about the machine. Not while workers run. */
void fst_numa_pretend(const char *root);

/* ---- fst_chunk.c; with the lock held, which they let go of meanwhile ---- */

/* Claims a chunk of the job and moves it. */
void fst_chunk_run(fst_job *job, fst_worker *worker);
/* Accounts for chunks whose copies are over; waits for the oldest if told to. */
void fst_chunk_retire(fst_worker *worker, bool wait);

#endif
