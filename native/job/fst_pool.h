/* fst_pool.h - the threads that serve the queue.
 *
 *   submit --> queue (FIFO of jobs, chunks claimed one at a time under the lock)
 *                |
 *     worker: claim chunk -> unlock -> move bytes -> lock -> account -> next
 *                |                     (to a device: start copies; account when they are over)
 *     last chunk accounted: job done, waiters woken, file and arena let go
 *
 * Workers start when there is work, block all signals, and leave after IDLE_SECONDS without any,
 * taking their buffers with them. If no thread can be had, the waiting caller does the work.
 */
#pragma once

#include "job/fst_chunk.h"

#define FST_MAX_THREADS 64

typedef struct fst_pool_state { /* under the queue's lock */
    fst_worker workers[FST_MAX_THREADS];
    int threads;
    int ending; /* how many shutdowns are under way */
    int idle;   /* of the threads: those that wait for work, or have just been started */
} fst_pool_state;

extern fst_pool_state fst_pool;

/* Before the first job: registers fork handlers, and calls fst_queue_prepare. */
void fst_pool_prepare(void);
/* Starts threads up to a number; returns how many run then. With the lock held. */
int fst_pool_grow(int wanted);
/* Waits for jobs in flight, then ends the workers. */
void fst_pool_stop(void);
