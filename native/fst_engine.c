/* fst_engine.c - the engine as a whole: its counters, and its shutdown. */
#include <string.h>

#include "job/fst_pool.h"

void fst_pool_get_stats(fst_pool_stats *stats) {
    memset(stats, 0, sizeof *stats);
    fst_pool_prepare(); /* else a fork now would find the lock taken */
    fst_queue_lock();
    stats->threads = fst_pool.threads;
    stats->jobs = fst_queue.jobs;
    stats->link_rate = fst_queue.window.rate;
    stats->link_measured = fst_queue.window.measured;
    fst_queue_unlock();
    stats->arenas = atomic_load(&fst_counts.arenas);
    stats->arena_bytes = atomic_load(&fst_counts.arena_bytes);
    stats->files = atomic_load(&fst_counts.files);
    stats->fed_files = atomic_load(&fst_counts.fed_files);
    stats->bytes_prefetched = atomic_load(&fst_counts.bytes_prefetched);
    stats->bytes_buffered = atomic_load(&fst_counts.bytes_buffered);
    stats->bytes_direct = atomic_load(&fst_counts.bytes_direct);
    stats->bytes_fed = atomic_load(&fst_counts.bytes_fed);
    stats->bytes_copied = atomic_load(&fst_counts.bytes_copied);
    stats->bytes_uploaded = atomic_load(&fst_counts.bytes_uploaded);
    fst_ring_stats(&stats->pinned_bytes, &stats->pinned_nanoseconds);
}

void fst_pool_shutdown(void) {
    fst_pool_stop();
    fst_ring_clear();
    fst_gds_clear();
}
