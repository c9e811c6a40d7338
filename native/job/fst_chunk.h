/* fst_chunk.h - a piece of a job on its way, and the worker that moves it. */
#pragma once

#include "job/fst_numa.h"
#include "job/fst_queue.h"

#define FST_IN_FLIGHT 2 /* chunks of one worker whose copies may be under way */

struct fst_chunk { /* claimed and not yet accounted for; lives in its worker */
    fst_job *job;
    uint64_t begin;  /* file offset */
    uint64_t wanted; /* bytes; gaps read over do not count */
    bool direct;     /* read with O_DIRECT, in the end */
    bool gds;        /* or by cuFile */
    bool fetching;   /* a fed file's callback has it, or is about to; nobody waits for that */
    fst_transfer transfer;
    struct fst_chunk *next; /* of the job */
};

typedef struct fst_worker { /* a thread of the pool, or a caller that helps */
    pthread_t thread;
    bool alive;
    int number;
    fst_pages slot; /* made when a chunk needs one, reused until the worker leaves */
    fst_chunk chunks[FST_IN_FLIGHT];
    int oldest, in_flight; /* of chunks: those whose copies were started */
    fst_placement place;
} fst_worker;

/* Both are called with the queue's lock held, and release it meanwhile. */

/* Claims a chunk of the job and moves it. */
void fst_chunk_run(fst_job *job, fst_worker *worker);
/* Accounts for chunks whose copies are over; with `wait` it waits for the oldest of them. */
void fst_chunk_retire(fst_worker *worker, bool wait);
