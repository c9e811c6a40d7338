/* fst_job.c - the life of a job: submitting, waiting, cancelling and releasing it. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fst_sys.h"
#include "job/fst_pool.h"

#define CHUNK_MIN (64u << 10)
#define CHUNK_MAX (64u << 20)

/* ---- with the lock held ---- */

static void cancel_locked(fst_job *job) {
    atomic_store(&job->stop, true);
    if (job->done) return;
    if (job->kind != JOB_PREFETCH && job->stats.bytes_done < job->stats.bytes_total) {
        fst_error error;
        (void)fst_fail(&error, FST_E_CANCELLED, ECANCELED, "load cancelled");
        fst_queue_fail(job, FST_E_CANCELLED, &error);
    }
    fst_queue_give_up_rest(job);
    fst_queue_finish_if_over(job);
}

/* Whether the caller's memory is safe: what is in flight only fetches, and asks before it goes on.
 */
static bool only_fetches(const fst_job *job) {
    for (const fst_chunk *chunk = job->chunks; chunk != NULL; chunk = chunk->next)
        if (!chunk->fetching) return false;
    return !job->finishing && job->chunks != NULL;
}

/* Whether the result is known although callbacks run on, which may take long. */
static bool has_failed(const fst_job *job) {
    return job->result != FST_OK && !job->quiesced && only_fetches(job);
}

/* Somebody waits for the job, which so overtakes what is read ahead. */
static void want(fst_job *job) {
    if (job->wanted || !fst_queue_is_fed(job)) return;
    job->wanted = true;
    (void)pthread_cond_broadcast(&fst_queue.work);
}

/* Whether every wanted byte before a file offset is where it belongs. */
static bool landed(const fst_job *job, uint64_t file_offset) {
    if (job->result != FST_OK) return false;
    if (fst_queue_has_chunk(job) && job->next_offset < file_offset) return false;
    for (const fst_chunk *chunk = job->chunks; chunk != NULL; chunk = chunk->next)
        if (chunk->begin < file_offset) return false;
    return true;
}

/* ---- public ---- */

static bool segments_fit(const fst_segment *segments, uint64_t count, const fst_file *file,
                         const fst_arena *arena, bool into_arena, uint64_t *total) {
    uint64_t previous_end = 0, file_bytes = file == NULL ? INT64_MAX : file->info.size;
    *total = 0;
    for (uint64_t i = 0; i < count; i++) {
        const fst_segment *s = &segments[i];
        if (s->file_offset > file_bytes || s->bytes > file_bytes - s->file_offset) return false;
        if (into_arena && (s->file_offset < previous_end || s->arena_offset > arena->bytes ||
                           s->bytes > arena->bytes - s->arena_offset))
            return false;
        previous_end = s->file_offset + s->bytes;
        *total += s->bytes; /* at most count file sizes; counters only */
    }
    return true;
}

static bool options_fit(const fst_job_options *options) {
    bool to_device = options->device != NULL;
    return options->struct_bytes == sizeof *options && options->threads >= 1 &&
           options->threads <= FST_MAX_THREADS && options->chunk_bytes >= CHUNK_MIN &&
           options->chunk_bytes <= CHUNK_MAX && options->mode >= FST_READ_BUFFERED &&
           options->mode <= (to_device ? FST_READ_GDS : FST_READ_DIRECT_IF_COLD);
}

/* Options that concern files must not be set. */
static bool options_fit_upload(const fst_job_options *options) {
    return options->device != NULL && options->mode == 0 && options->drop_cache == 0 &&
           options->reserve_bytes == 0;
}

/* Records an event behind all work pending on the stream on which the arena was allocated. */
static int note_allocation(fst_job *job, fst_error *err) {
    fst_device *device = job->options.device;
    fst_gpu_scope scope;
    int code = fst_gpu_enter(device, &scope, err);
    if (code != FST_OK) return code;
    void *event = fst_gpu_take_event(device, err);
    int status = event == NULL ? 0 : device->gpu->event_record(event, (void *)job->options.stream);
    fst_gpu_leave(&scope);
    if (event == NULL) return err->code;
    if (status != 0) {
        fst_gpu_give_event(device, event);
        return fst_gpu_fail(err, device, "recording an event on the allocating stream", status);
    }
    job->allocated = event;
    return FST_OK;
}

static fst_job *new_job(enum job_kind kind, const fst_segment *segments, uint64_t count,
                        const fst_job_options *options) {
    fst_job *job = calloc(1, sizeof *job);
    fst_segment *copy = malloc(count == 0 ? 1 : (size_t)count * sizeof *copy);
    if (job == NULL || copy == NULL) {
        free(job);
        free(copy);
        return NULL;
    }
    if (count > 0) memcpy(copy, segments, (size_t)count * sizeof *copy);
    job->kind = kind;
    job->refs = 2;
    job->direct_fd = -1;
    job->segments = copy;
    job->count = count;
    job->options = *options;
    job->options.chunk_bytes = fst_align_up(options->chunk_bytes, FST_DIRECT_ALIGN);
    fst_queue_set_cursor(job, 0);
    return job;
}

static void open_direct(fst_job *job, const fst_file *file) {
    if (job->kind != JOB_READ || job->options.mode == FST_READ_BUFFERED) return;
    job->direct_fd = fst_file_open_direct(file);
    if (job->direct_fd < 0) {
        job->stats.direct_errno = errno;
        job->options.mode = FST_READ_BUFFERED;
    } else if (job->options.mode == FST_READ_GDS) {
        fst_error error = {0};
        if (fst_gds_register(job->options.device, job->direct_fd, &job->gds_handle, &error) ==
            FST_OK)
            (void)snprintf(job->stats.gds_note, sizeof job->stats.gds_note, "%s", fst_gds_kind());
        else
            fst_queue_refuse_gds(job, &error);
    }
}

static void enqueue(fst_job *job) {
    fst_queue_lock();
    fst_queue_append(job);
    uint64_t chunks = job->stats.bytes_total / job->options.chunk_bytes + 1;
    /* Workers in callbacks may be there for long. */
    int wanted = (int)fst_min((uint64_t)job->options.threads, chunks) + fst_queue.window.calls;
    int threads = fst_pool_grow(wanted < FST_MAX_THREADS ? wanted : FST_MAX_THREADS);
    job->inline_help = threads == 0;
    if (job->inline_help && job->kind == JOB_PREFETCH) fst_queue_give_up_rest(job);
    fst_queue_finish_if_over(job); /* nothing to do at all */
    (void)pthread_cond_broadcast(&fst_queue.work);
    fst_queue_unlock();
}

static int submit(enum job_kind kind, fst_file *file, fst_arena *arena, const fst_segment *segments,
                  uint64_t count, const fst_job_options *options, fst_job **out, fst_error *err) {
    uint64_t total;
    const char *source = fst_source_name(file);
    *out = NULL;
    if (!options_fit(options) || count > SIZE_MAX / sizeof *segments ||
        (kind == JOB_UPLOAD && !options_fit_upload(options)))
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: job options out of range", source);
    if (!segments_fit(segments, count, file, arena, kind != JOB_PREFETCH, &total))
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: a segment is out of range", source);
    if ((options->mode != FST_READ_BUFFERED || options->drop_cache) &&
        fst_file_refuse_fed(file, "O_DIRECT, cuFile or page cache", err) != FST_OK)
        return err->code;
    fst_pool_prepare();
    fst_job *job = new_job(kind, segments, count, options);
    if (job == NULL)
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "%s: no memory for a job of %llu segments",
                        source, (unsigned long long)count);
    job->stats.bytes_total = total;
    int code = options->device == NULL ? FST_OK : note_allocation(job, err);
    if (code != FST_OK) {
        fst_queue_free(job);
        return code;
    }
    if (file != NULL) fst_file_retain(file);
    fst_arena_retain(arena);
    job->file = file;
    job->fed = file != NULL && file->fed != NULL;
    job->arena = arena;
    job->node = options->device == NULL ? fst_numa_of_file(file) : options->device->numa_node;
    open_direct(job, file);
    enqueue(job);
    *out = job;
    return FST_OK;
}

int fst_job_prefetch(fst_file *file, fst_arena *map, const fst_segment *segments, uint64_t count,
                     const fst_job_options *options, fst_job **out, fst_error *err) {
    if (fst_file_refuse_fed(file, "map", err) != FST_OK) {
        *out = NULL;
        return err->code;
    }
    if (map->kind != FST_ARENA_MAP || map->bytes != file->info.size) {
        *out = NULL;
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: read-ahead needs the file's map",
                        file->path);
    }
    return submit(JOB_PREFETCH, file, map, segments, count, options, out, err);
}

int fst_job_read(fst_file *file, fst_arena *arena, const fst_segment *segments, uint64_t count,
                 const fst_job_options *options, fst_job **out, fst_error *err) {
    return submit(JOB_READ, file, arena, segments, count, options, out, err);
}

int fst_job_upload(fst_arena *arena, const fst_segment *segments, uint64_t count,
                   const fst_job_options *options, fst_job **out, fst_error *err) {
    return submit(JOB_UPLOAD, NULL, arena, segments, count, options, out, err);
}

int fst_job_wait_until(fst_job *job, uint64_t file_offset, int timeout_ms, fst_error *err) {
    struct timespec until = fst_queue_deadline(timeout_ms);
    fst_worker helper = {0};
    fst_queue_lock();
    want(job);
    int timed_out = 0;
    while ((!job->done || job->quiesced) && !landed(job, file_offset) && !has_failed(job) &&
           timed_out == 0) {
        if (job->inline_help && fst_queue_has_chunk(job) && fst_queue.forking == 0) {
            fst_chunk_run(job, &helper);
            fst_queue_finish_if_over(job);
            fst_chunk_retire(&helper, true);                /* it goes with this call */
            (void)pthread_cond_broadcast(&fst_queue.event); /* a fork may wait for this chunk */
            break; /* back to the caller between chunks: it may have been interrupted */
        }
        timed_out = pthread_cond_timedwait(&fst_queue.event, &fst_queue.lock, &until);
    }
    bool known = job->done || landed(job, file_offset) || has_failed(job);
    int code = known ? job->result : FST_PENDING;
    if (job->quiesced && code == FST_E_CANCELLED) code = FST_PENDING;
    if (code != FST_OK && code != FST_PENDING) *err = job->error;
    fst_queue_unlock();
    fst_pages_unmap(&helper.slot);
    return code;
}

int fst_job_wait(fst_job *job, int timeout_ms, fst_error *err) {
    int code = fst_job_wait_until(job, UINT64_MAX, timeout_ms, err);
    if (code != FST_OK) return code;
    /* All bytes have landed; file and arena are still to be released. */
    fst_queue_lock();
    while (!job->done) (void)pthread_cond_wait(&fst_queue.event, &fst_queue.lock);
    fst_queue_unlock();
    return FST_OK;
}

void fst_job_cancel(fst_job *job) {
    if (job == NULL) return;
    fst_queue_lock();
    cancel_locked(job);
    fst_queue_unlock();
}

static bool is_to_device(const fst_job *job) { return job->options.device != NULL; }

static fst_job *first_job(bool (*is_one)(const fst_job *)) {
    fst_job *job = fst_queue.head;
    while (job != NULL && !is_one(job)) job = job->next;
    return job;
}

/* Cancels all jobs of a kind, and waits until nothing of them is in flight. */
static void quiesce(bool (*is_one)(const fst_job *)) {
    fst_pool_prepare();
    fst_queue_lock();
    for (fst_job *job; (job = first_job(is_one)) != NULL;) {
        job->quiesced = true; /* no thread gets an error at the very end of the process */
        if (job->finishing || atomic_load(&job->stop))
            (void)pthread_cond_wait(&fst_queue.event, &fst_queue.lock);
        else
            cancel_locked(job); /* may release the lock meanwhile: search again from the start */
    }
    fst_queue_unlock();
}

void fst_device_quiesce(void) { quiesce(is_to_device); }

void fst_feed_end(void) {
    fst_feed_shut();
    quiesce(fst_queue_is_fed);
}

void fst_job_get_stats(fst_job *job, fst_job_stats *stats) {
    fst_queue_lock();
    *stats = job->stats;
    fst_queue_unlock();
}

void fst_job_release(fst_job **owned) {
    fst_job *job = *owned;
    *owned = NULL;
    if (job == NULL) return;
    fst_queue_lock();
    if (job->kind != JOB_PREFETCH && !job->done) {
        /* Its destination may be the caller's memory: nothing may be in flight after this. */
        cancel_locked(job);
        while (!job->done && !only_fetches(job))
            (void)pthread_cond_wait(&fst_queue.event, &fst_queue.lock);
    }
    bool last = --job->refs == 0;
    fst_queue_unlock();
    if (last) fst_queue_free(job);
}
