/* fst_chunk.c - claiming a piece of a job, moving its bytes, and accounting for it. */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "io/fst_io_buffered.h"
#include "io/fst_io_cache.h"
#include "io/fst_io_direct.h"
#include "io/fst_io_memory.h"
#include "job/fst_chunk.h"

#define SEGMENT_GAP (64u << 10) /* unwanted bytes worth reading over in one request */
#define HEADROOM_EVERY (64u << 20)

/* ---- claiming and accounting, with the lock held ---- */

/* Whether chunks may be packed into their slots: not what comes in whole blocks. */
static bool may_pack(const fst_job *job) {
    if (fst_queue_is_fed(job)) return false;
    return job->kind == JOB_UPLOAD || (job->kind == JOB_READ && job->options.device != NULL &&
                                       (job->options.mode == FST_READ_BUFFERED ||
                                        job->options.mode == FST_READ_DIRECT_IF_COLD));
}

/* Where a piece that begins at `from` and belongs at `arena_at` has to end so that a packed slot
 * holds it; `from` when not a byte of it fits. */
static uint64_t pack(const fst_job *job, fst_packing *packing, uint64_t from, uint64_t to,
                     uint64_t arena_at, uint64_t unit, bool *joins) {
    uint64_t place = fst_pack(packing, job->arena, arena_at, joins);
    if (place >= job->options.chunk_bytes) return from;
    uint64_t room = job->options.chunk_bytes - place;
    if (to - from > room) {
        to = from + room;
        if (fst_align_down(to, unit) > from) to = fst_align_down(to, unit);
    }
    *packing = (fst_packing){arena_at + (to - from), place + (to - from)};
    return to;
}

/* Takes a file range that starts at the cursor and runs over the following segments while it fits
 * and no large gap lies between them. An upload reads no gaps, so their size does not matter. */
static void claim(fst_job *job, fst_io_context *io, fst_chunk *chunk) {
    uint64_t begin = job->next_offset, end = begin, wanted = 0, at = job->next_segment;
    /* No two workers may share a block, nor a huge page of the page cache. */
    uint64_t unit = job->options.chunk_bytes < FST_HUGE_PAGE ? FST_DIRECT_ALIGN : FST_HUGE_PAGE;
    uint64_t limit = fst_align_down(begin, unit) + job->options.chunk_bytes, gap = SEGMENT_GAP;
    fst_packing packing = {0};
    bool packs = may_pack(job), one_run = true, split = false;
    if (job->kind == JOB_UPLOAD) limit = gap = UINT64_MAX;
    io->first = at;
    io->begin = begin;
    for (; at < job->count; at++) {
        const fst_segment *s = &job->segments[at];
        uint64_t from = at == io->first ? begin : s->file_offset;
        uint64_t to = s->file_offset + s->bytes, stop = fst_min(to, limit);
        if (s->bytes == 0) continue;
        if (from < end || from >= limit || from - end > gap) break;
        bool joins = false;
        if (packs)
            stop = pack(job, &packing, from, stop, s->arena_offset + (from - s->file_offset), unit,
                        &joins);
        if (stop == from) break;
        if (wanted > 0) one_run = one_run && joins && from == end;
        end = stop;
        wanted += end - from;
        split = end < to;
        if (split) break;
    }
    io->end = end;
    /* A file's chunk is packed only if it is one copy: then there is no gap to read over. */
    io->packed = packs && (job->kind == JOB_UPLOAD || one_run);
    if (split) { /* the rest of this segment is the next chunk's */
        job->next_segment = at;
        job->next_offset = end;
    } else {
        fst_queue_set_cursor(job, at);
    }
    *chunk = (fst_chunk){.job = job, .begin = begin, .wanted = wanted, .next = job->chunks};
    job->chunks = chunk;
}

/* A chunk of a fed file is about to be fetched, or has been: then so many bytes of it have come. */
static void begin_fetch(fst_job *job, fst_chunk *chunk) {
    fst_fed *fed = job->file->fed;
    chunk->fetching = true;
    fed->calls++;
    fst_window_begin(&fst_queue.window, job->options.threads, fst_nanoseconds(CLOCK_MONOTONIC));
}

static void end_fetch(fst_job *job, fst_chunk *chunk, uint64_t bytes) {
    if (!chunk->fetching) return;
    uint64_t now = fst_nanoseconds(CLOCK_MONOTONIC);
    chunk->fetching = false;
    job->file->fed->calls--;
    if (fst_window_end(&fst_queue.window, job->options.threads, bytes, now))
        (void)pthread_cond_broadcast(&fst_queue.work);
    else
        (void)pthread_cond_signal(&fst_queue.work); /* this worker has the bytes to place first */
}

static void account(fst_chunk *chunk, int code, const fst_error *error) {
    fst_job *job = chunk->job;
    fst_chunk **link = &job->chunks;
    while (*link != chunk) link = &(*link)->next;
    *link = chunk->next;
    if (code != FST_OK) {
        fst_queue_fail(job, code, error);
        return;
    }
    job->stats.bytes_done += chunk->wanted;
    if (chunk->direct) job->stats.bytes_direct += chunk->wanted;
    if (chunk->gds) job->stats.bytes_gds += chunk->wanted;
}

/* Whether it is time to look at memory again. */
static bool headroom_due(fst_job *job) {
    if (job->options.reserve_bytes == 0 || job->stats.bytes_done < job->headroom_at) return false;
    job->headroom_at = job->stats.bytes_done + HEADROOM_EVERY;
    return true;
}

/* ---- moving, without the lock ---- */

/* At least a huge page: O_DIRECT splits a read into small pages into as many requests. */
static bool ensure_slot(fst_worker *worker, uint64_t bytes) {
    if (bytes < FST_HUGE_PAGE) bytes = FST_HUGE_PAGE;
    if (worker->slot.bytes >= bytes) return true;
    fst_pages_unmap(&worker->slot);
    errno = fst_pages_map(&worker->slot, bytes);
    return errno == 0;
}

static void use_slot(fst_io_context *io, const fst_pages *pages) {
    io->slot = pages->data;
    io->slot_bytes = pages->bytes;
}

/* Cached pages count as free memory, including those read ahead for maps still in use. Reading on
 * would evict them before they are used. */
static bool memory_is_short(const fst_job *job) {
    uint64_t headroom = fst_memory_headroom(), ahead = atomic_load(&fst_counts.bytes_ahead);
    return headroom < ahead || headroom - ahead < job->options.reserve_bytes;
}

/* Returns 0, or why it gave up. */
static int move_ahead(const fst_job *job, fst_io_context *io, fst_worker *worker,
                      bool look_at_memory, uint64_t *cold) {
    if (look_at_memory && memory_is_short(job)) return ENOMEM;
    int code = fst_io_prefetch(io, cold);
    if (code != ENOBUFS) return code;
    if (!ensure_slot(worker, job->options.chunk_bytes)) return ENOMEM;
    use_slot(io, &worker->slot);
    return fst_io_read_through(io);
}

/* Without a probe one page is taken as a sample; if it is missing, it is read. */
static bool is_cached(const fst_io_context *io) {
    uint64_t resident = 0, length = io->end - io->begin;
    int probe = FST_PROBE_NONE;
    (void)fst_file_residency(io->file, io->begin, length, &resident, &probe);
    if (probe == FST_PROBE_NONE) return fst_file_has_page(io->file, io->begin + length / 2);
    return resident == length;
}

/* Where a chunk's bytes lie in a slot that holds them as the file does. */
static unsigned char *place_in_slot(const fst_io_context *io) {
    return io->slot + (io->begin - fst_align_down(io->begin, FST_DIRECT_ALIGN));
}

/* Has a fed file's callback fill memory that lives until the chunk is accounted for, whatever the
 * job's owner does meanwhile. After it the owner waits for this chunk, unless it has given up:
 * FST_E_CANCELLED. Takes the lock. */
static int fetch(fst_job *job, const fst_io_context *io, fst_chunk *chunk, unsigned char *into,
                 fst_error *err) {
    uint64_t bytes = io->end - io->begin;
    int code = fst_feed_fill(io->file->fed, io->file->path, io->begin, bytes, into, err);
    fst_queue_lock();
    end_fetch(job, chunk, code == FST_OK ? bytes : 0);
    if (code == FST_OK && FST_KEEPS(FST_RULE_ASK)) code = fst_io_check_stop(io, err);
    fst_queue_unlock();
    return code;
}

/* Where all of a chunk goes if that is one run of memory of the arena's own; else NULL. */
static unsigned char *run_of(const fst_io_context *io) {
    const fst_segment *s = &io->segments[io->first];
    if (io->arena->kind != FST_ARENA_ANONYMOUS || io->end > s->file_offset + s->bytes) return NULL;
    return io->arena->data + s->arena_offset + (io->begin - s->file_offset);
}

/* Faults huge pages in before the callback fills them: the time of the faults alone is judged. */
static void touch(fst_arena *arena, unsigned char *run, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += FST_HUGE_PAGE) {
        uint64_t before = fst_nanoseconds(CLOCK_THREAD_CPUTIME_ID);
        ((volatile unsigned char *)run)[at] = 0;
        fst_arena_note_touch(arena, fst_min(FST_HUGE_PAGE, bytes - at),
                             fst_nanoseconds(CLOCK_THREAD_CPUTIME_ID) - before);
    }
}

/* A chunk of a fed file, into host memory. */
static int fetch_to_memory(fst_job *job, fst_io_context *io, fst_worker *worker, fst_chunk *chunk,
                           fst_error *err) {
    unsigned char *run = run_of(io);
    if (run != NULL) {
        touch(io->arena, run, io->end - io->begin);
        return fetch(job, io, chunk, run, err);
    }
    if (!ensure_slot(worker, job->options.chunk_bytes))
        return fst_fail(err, FST_E_NOMEM, errno, "%s: no memory for a buffer of %llu bytes",
                        io->file->path, (unsigned long long)job->options.chunk_bytes);
    use_slot(io, &worker->slot);
    int code = fetch(job, io, chunk, place_in_slot(io), err);
    if (code == FST_OK) fst_pieces_scatter(io);
    return code;
}

/* Reads into host memory. *refused becomes the errno of O_DIRECT where it was refused. */
static int read_to_memory(fst_job *job, fst_io_context *io, fst_worker *worker, fst_chunk *chunk,
                          int *refused, fst_error *err) {
    if (chunk->fetching) return fetch_to_memory(job, io, worker, chunk, err);
    if (chunk->direct) {
        if (!ensure_slot(worker, job->options.chunk_bytes))
            return fst_fail(err, FST_E_NOMEM, errno,
                            "%s: no memory for a read buffer of %llu bytes", io->file->path,
                            (unsigned long long)job->options.chunk_bytes);
        use_slot(io, &worker->slot);
        int code = fst_io_direct(io, err);
        if (code != FST_E_INVALID) return code;
        *refused = err->sys_errno; /* the page cache takes over */
        chunk->direct = false;
    }
    return fst_io_buffered(io, err);
}

/* Takes a slot to fill. While there is none, waits for this worker's oldest copy, or without one
 * for another worker's slot. Takes the lock. */
static int take_slot(const fst_job *job, fst_worker *worker, fst_slot **slot, fst_error *err) {
    const fst_job_options *o = &job->options;
    for (;;) {
        bool wait = worker->in_flight == 0;
        int code = fst_ring_take(o->device, o->chunk_bytes, o->pinned_bytes, wait, slot, err);
        if (code != FST_PENDING) return code;
        if (atomic_load_explicit(&job->stop, memory_order_relaxed))
            return fst_fail(err, FST_E_CANCELLED, ECANCELED, "%s: load cancelled",
                            fst_source_name(job->file));
        if (wait) continue;
        fst_queue_lock();
        fst_chunk_retire(worker, true);
        fst_queue_unlock();
    }
}

/* Reads by O_DIRECT if the chunk asks for it, and through the page cache where that is refused. */
static int fill_from_file(fst_io_context *io, fst_chunk *chunk, int *refused, fst_error *err) {
    int code = chunk->direct ? fst_io_direct_slot(io, err) : FST_E_INVALID;
    if (code != FST_E_INVALID) return code;
    if (chunk->direct) *refused = err->sys_errno;
    chunk->direct = false;
    if (io->packed)
        fst_pieces_clear_padding(io);
    else
        io->into = place_in_slot(io);
    return fst_io_buffered(io, err);
}

static int fill_slot(fst_job *job, fst_io_context *io, fst_worker *worker, fst_chunk *chunk,
                     int *refused, fst_error *err) {
    fst_slot *slot;
    int code = take_slot(job, worker, &slot, err);
    if (code != FST_OK) return code;
    use_slot(io, &slot->pages);
    if (chunk->fetching)
        code = fetch(job, io, chunk, place_in_slot(io), err);
    else if (job->kind == JOB_UPLOAD)
        code = fst_io_memory(io, err);
    else
        code = fill_from_file(io, chunk, refused, err);
    if (code == FST_OK)
        chunk->transfer.slot = slot;
    else
        fst_ring_give(slot);
    return code;
}

static int fill_staging(const fst_job *job, const fst_io_context *io, fst_chunk *chunk,
                        fst_error *err) {
    fst_staging *staging;
    int code = fst_gds_take(job->options.device, job->options.chunk_bytes, &staging, err);
    if (code != FST_OK) return code;
    code = fst_gds_read(io, job->gds_handle, staging, err);
    if (code == FST_OK)
        chunk->transfer.staging = staging;
    else
        fst_gds_give(staging);
    return code;
}

/* Reads into a slot or a staging block, and starts the copies from there. *gds_refused is filled if
 * cuFile did not read. */
static int read_to_device(fst_job *job, fst_io_context *io, fst_worker *worker, fst_chunk *chunk,
                          int *refused, fst_error *gds_refused, fst_error *err) {
    int code = FST_E_INVALID;
    chunk->transfer.device = job->options.device;
    if (chunk->gds) {
        code = fill_staging(job, io, chunk, err);
        if (code == FST_E_INVALID) {
            *gds_refused = *err;
            chunk->gds = false;
            chunk->direct = !is_cached(io);
        }
    }
    if (code == FST_E_INVALID) code = fill_slot(job, io, worker, chunk, refused, err);
    if (code != FST_OK) return code;
    return fst_transfer_start(&chunk->transfer, worker->number, job->allocated, io, err);
}

static void count_bytes(const fst_job *job, const fst_chunk *chunk, uint64_t cold) {
    if (job->kind == JOB_PREFETCH)
        atomic_fetch_add(&fst_counts.bytes_prefetched, cold);
    else if (job->kind == JOB_UPLOAD)
        atomic_fetch_add(&fst_counts.bytes_uploaded, chunk->wanted);
    else if (fst_queue_is_fed(job))
        atomic_fetch_add(&fst_counts.bytes_fed, chunk->wanted);
    else if (!chunk->gds)
        atomic_fetch_add(chunk->direct ? &fst_counts.bytes_direct : &fst_counts.bytes_buffered,
                         chunk->wanted);
    if (job->options.device != NULL) atomic_fetch_add(&fst_counts.bytes_copied, chunk->wanted);
}

/* ---- a worker's part ---- */

static fst_io_context context_of(const fst_job *job) {
    return (fst_io_context){.file = job->file,
                            .direct_fd = job->direct_fd,
                            .arena = job->arena,
                            .segments = job->segments,
                            .count = job->count,
                            .drop_cache = job->options.drop_cache != 0,
                            .stop = &job->stop};
}

static bool wants_direct(const fst_job *job) {
    return job->kind == JOB_READ &&
           (job->options.mode == FST_READ_DIRECT || job->options.mode == FST_READ_DIRECT_IF_COLD);
}

static void run_prefetch(fst_job *job, fst_worker *worker) {
    fst_io_context io = context_of(job);
    fst_chunk chunk;
    uint64_t cold = 0;
    if (fst_arena_abandoned(job->arena)) {
        fst_queue_give_up_rest(job); /* its last user is gone */
        return;
    }
    bool look_at_memory = headroom_due(job);
    claim(job, &io, &chunk);
    job->reading++;
    fst_queue_unlock();
    fst_numa_place(&worker->place, job->node, job->options.threads);
    int failed = move_ahead(job, &io, worker, look_at_memory, &cold);
    if (failed == 0) {
        count_bytes(job, &chunk, cold);
        if (cold > 0) fst_arena_count_ahead(io.arena, cold);
    } else {
        fst_arena_keep_no_more(io.arena); /* else faults would read the rest page by page */
    }
    fst_queue_lock();
    job->reading--;
    if (failed != 0) chunk.wanted = 0;
    account(&chunk, FST_OK, NULL);
    if (failed != 0)
        fst_queue_give_up_rest(job); /* this is no failure: the map still works */
    else
        job->stats.bytes_cold += cold;
}

/* A read or an upload. */
static void run_read(fst_job *job, fst_worker *worker) {
    fst_io_context io = context_of(job);
    fst_chunk here, *chunk = &here;
    fst_error error = {0}, gds_refused = {0};
    int refused = 0, code;
    bool to_device = job->options.device != NULL, direct = wants_direct(job);
    bool if_cold = job->options.mode == FST_READ_DIRECT_IF_COLD;
    bool shared = direct && !to_device; /* with a child, if the process forks now */
    bool fed = fst_queue_is_fed(job);
    /* The worker has room: see fst_chunk_retire. Taking a slot may retire the oldest, which
     * moves neither this place nor its turn. */
    if (to_device) chunk = &worker->chunks[(worker->oldest + worker->in_flight) % FST_IN_FLIGHT];
    claim(job, &io, chunk);
    chunk->gds = job->options.mode == FST_READ_GDS;
    if (fed) begin_fetch(job, chunk);
    job->reading++;
    fst_queue.in_flight_direct += shared;
    fst_queue_unlock();

    fst_numa_place(&worker->place, job->node, job->options.threads);
    chunk->direct = direct && !(if_cold && is_cached(&io));
    if (chunk->direct) io.packed = false; /* blocks come as they are in the file */
    uint64_t before = fst_nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    if (to_device) {
        code = read_to_device(job, &io, worker, chunk, &refused, &gds_refused, &error);
    } else {
        code = read_to_memory(job, &io, worker, chunk, &refused, &error);
        if (!fed)
            fst_arena_note_fill(io.arena, chunk->wanted,
                                fst_nanoseconds(CLOCK_THREAD_CPUTIME_ID) - before);
    }
    if (code == FST_OK) count_bytes(job, chunk, 0);

    fst_queue_lock();
    end_fetch(job, chunk, 0); /* where it failed before it called */
    fst_queue.in_flight_direct -= shared;
    job->reading--;
    if (gds_refused.code != FST_OK) fst_queue_refuse_gds(job, &gds_refused);
    if (refused != 0) {
        job->options.mode = FST_READ_BUFFERED;
        if (job->stats.direct_errno == 0) job->stats.direct_errno = refused;
    }
    if (!to_device || code != FST_OK) {
        account(chunk, code, &error);
        return;
    }
    worker->in_flight++;
    if (!FST_KEEPS(FST_RULE_LANDED)) chunk->begin = UINT64_MAX;
}

void fst_chunk_run(fst_job *job, fst_worker *worker) {
    if (job->kind == JOB_PREFETCH)
        run_prefetch(job, worker);
    else
        run_read(job, worker);
}

void fst_chunk_retire(fst_worker *worker, bool wait) {
    while (worker->in_flight > 0) {
        fst_chunk *chunk = &worker->chunks[worker->oldest];
        fst_error error = {0};
        fst_queue_unlock();
        if (!wait && !fst_transfer_ready(&chunk->transfer)) {
            fst_queue_lock();
            return;
        }
        int code = fst_transfer_finish(&chunk->transfer, &error);
        fst_queue_lock();
        worker->oldest = (worker->oldest + 1) % FST_IN_FLIGHT;
        worker->in_flight--;
        fst_job *job = chunk->job;
        account(chunk, code, &error);
        fst_queue_finish_if_over(job);
        (void)pthread_cond_broadcast(&fst_queue.event);
        wait = false; /* for the oldest only */
    }
}
