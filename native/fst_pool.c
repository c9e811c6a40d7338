/* fst_pool.c - worker threads, the job queue, and what a fork does to them.
 *
 *   submit --> queue (FIFO of jobs, chunks claimed one at a time under the lock)
 *                |
 *     worker: claim chunk -> unlock -> move bytes -> lock -> account -> next
 *                |
 *     last chunk accounted: job done, waiters woken, file and arena let go
 *
 * One lock for everything; it is taken once per chunk of megabytes. Workers start when
 * there is work, block all signals, and leave after IDLE_SECONDS without any, taking
 * their slots with them. If no thread can be had, the waiting caller does the work.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "fst_internal.h"
#include "fst_sys.h"

#define MAX_THREADS 64
#define IDLE_SECONDS 10
#define STACK_BYTES (1u << 20) /* address space only; libraries' thread-local data is in it */
#define CHUNK_MIN (64u << 10)
#define CHUNK_MAX (64u << 20)
#define SEGMENT_GAP (64u << 10) /* unwanted bytes worth reading over in one request */
#define HEADROOM_EVERY (64u << 20)

enum job_kind {
    JOB_PREFETCH,
    JOB_READ
};

struct fst_job {
    unsigned refs; /* owner, queue; under the lock like all below but stop */
    enum job_kind kind;
    atomic_bool stop;
    bool finishing; /* over, and letting go of what only running needed */
    bool done;
    bool inline_help; /* no thread could be started: waiters work */
    int result;
    fst_error error;
    fst_file *file;
    fst_arena *arena;
    int direct_fd;
    fst_job_options options;
    fst_segment *segments;
    uint64_t count;
    uint64_t next_segment; /* cursor: where the next chunk begins */
    uint64_t next_offset;  /* file offset */
    int in_flight;
    uint64_t headroom_at; /* bytes_done at which to look at memory again */
    fst_job_stats stats;
    fst_job *next;
};

typedef struct worker {
    pthread_t thread;
    bool alive;
    unsigned char *slot;
    uint64_t slot_bytes;
} worker;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* a job was queued, or the pool must end */
    pthread_cond_t event; /* a chunk or a thread finished */
    fst_job *head, *tail;
    worker workers[MAX_THREADS];
    int threads, jobs;
    int in_flight_direct;
    int finishing;       /* jobs letting go of file and arena outside the lock */
    int forking, ending; /* how many forks and shutdowns are under way */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

static void lock(void) { (void)pthread_mutex_lock(&pool.lock); }
static void unlock(void) { (void)pthread_mutex_unlock(&pool.lock); }

static struct timespec deadline_in(int milliseconds) {
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

/* ---- slots ---- */

static void free_slot(worker *w) {
    if (w->slot != NULL) (void)munmap(w->slot, (size_t)w->slot_bytes);
    w->slot = NULL;
    w->slot_bytes = 0;
}

static bool ensure_slot(worker *w, uint64_t bytes) {
    if (w->slot_bytes >= bytes) return true;
    free_slot(w);
    void *map = FST_SYS->mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return false;
    (void)FST_SYS->madvise(map, (size_t)bytes, MADV_HUGEPAGE);
    w->slot = map;
    w->slot_bytes = bytes;
    return true;
}

/* ---- jobs ---- */

/* Only for jobs that are done: these hold no file and no arena any more. */
static void destroy_job(fst_job *job) {
    free(job->segments);
    free(job);
}

/* Let go of what only running needed, as soon as nothing runs: a waiting owner then
 * holds counters only. */
static void drop_resources(fst_job *job, fst_file **file, fst_arena **arena, int *fd) {
    *file = job->file;
    *arena = job->arena;
    *fd = job->direct_fd;
    job->file = NULL;
    job->arena = NULL;
    job->direct_fd = -1;
}

static void unlink_job(fst_job *job) {
    fst_job **link = &pool.head, *previous = NULL;
    while (*link != NULL && *link != job) {
        previous = *link;
        link = &(*link)->next;
    }
    if (*link == NULL) return;
    *link = job->next;
    if (pool.tail == job) pool.tail = previous;
    pool.jobs--;
}

static bool has_chunk(const fst_job *job) { return !job->done && job->next_segment < job->count; }

static void give_up_rest(fst_job *job) { job->next_segment = job->count; }

/* Moves the cursor past empty segments to where the next chunk begins. */
static void set_cursor(fst_job *job, uint64_t segment) {
    while (segment < job->count && job->segments[segment].bytes == 0) segment++;
    job->next_segment = segment;
    if (segment < job->count) job->next_offset = job->segments[segment].file_offset;
}

/* The next chunk: a file range that starts at the cursor and runs on over the segments
 * behind it as long as it fits and no large gap lies between. Returns how many bytes of
 * it are wanted; gaps read over do not count. */
static uint64_t claim(fst_job *job, fst_io_context *io) {
    uint64_t begin = job->next_offset, end = begin, wanted = 0, at = job->next_segment;
    uint64_t limit = fst_align_down(begin, FST_DIRECT_ALIGN) + job->options.chunk_bytes;
    io->first = at;
    io->begin = begin;
    job->in_flight++;
    for (; at < job->count; at++) {
        const fst_segment *s = &job->segments[at];
        uint64_t from = at == io->first ? begin : s->file_offset;
        uint64_t to = s->file_offset + s->bytes;
        if (s->bytes == 0) continue;
        if (from < end || from >= limit || from - end > SEGMENT_GAP) break;
        end = fst_min(to, limit);
        wanted += end - from;
        if (to > limit) { /* the rest of this segment is the next chunk's */
            job->next_segment = at;
            job->next_offset = limit;
            io->end = end;
            return wanted;
        }
    }
    io->end = end;
    set_cursor(job, at);
    return wanted;
}

/* With the lock held: whether it is time to look at memory again. */
static bool headroom_due(fst_job *job) {
    if (job->options.reserve_bytes == 0 || job->stats.bytes_done < job->headroom_at) return false;
    job->headroom_at = job->stats.bytes_done + HEADROOM_EVERY;
    return true;
}

/* *refused becomes the errno with which O_DIRECT was refused, if it was. */
static int run_read(const fst_job *job, fst_io_context *io, worker *w, bool direct, int *refused,
                    fst_error *err) {
    if (direct) {
        /* One extra block: a chunk may begin inside its first block. */
        if (!ensure_slot(w, job->options.chunk_bytes + FST_DIRECT_ALIGN))
            return fst_fail(err, FST_E_NOMEM, errno,
                            "%s: no memory for a read buffer of %llu bytes", io->file->path,
                            (unsigned long long)job->options.chunk_bytes);
        io->slot = w->slot;
        io->slot_bytes = w->slot_bytes;
        int code = fst_io_direct(io, err);
        if (code != FST_E_INVALID) return code;
        *refused = err->sys_errno; /* the page cache takes over */
    }
    return fst_io_buffered(io, err);
}

/* Cached pages count as free memory, also those read ahead for maps still in use. To read
 * on would push them out before anybody came for them. */
static bool memory_is_short(const fst_job *job) {
    uint64_t headroom = fst_memory_headroom(), ahead = atomic_load(&fst_counts.bytes_ahead);
    return headroom < ahead || headroom - ahead < job->options.reserve_bytes;
}

static int run_prefetch(const fst_job *job, fst_io_context *io, worker *w, bool look_at_memory,
                        uint64_t *cold) {
    if (look_at_memory && memory_is_short(job)) return ENOMEM;
    int code = fst_io_prefetch(io, cold);
    if (code != ENOBUFS) return code;
    if (!ensure_slot(w, job->options.chunk_bytes)) return ENOMEM;
    io->slot = w->slot;
    io->slot_bytes = w->slot_bytes;
    return fst_io_read_through(io);
}

static void count_bytes(enum job_kind kind, bool direct, uint64_t wanted, uint64_t cold) {
    if (kind == JOB_PREFETCH)
        atomic_fetch_add(&fst_counts.bytes_prefetched, cold);
    else if (direct)
        atomic_fetch_add(&fst_counts.bytes_direct, wanted);
    else
        atomic_fetch_add(&fst_counts.bytes_buffered, wanted);
}

static uint64_t thread_nanoseconds(void) {
    struct timespec now;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) != 0) return 0;
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Called with the lock held and a chunk to claim; returns with the lock held. */
static void run_chunk(fst_job *job, worker *w) {
    fst_io_context io = {.file = job->file,
                         .direct_fd = job->direct_fd,
                         .arena = job->arena,
                         .segments = job->segments,
                         .count = job->count,
                         .drop_cache = job->options.drop_cache != 0,
                         .stop = &job->stop};
    fst_error error = {0};
    uint64_t cold = 0;
    int code = FST_OK, failed = 0, refused = 0;
    if (job->kind == JOB_PREFETCH && fst_arena_abandoned(job->arena)) {
        give_up_rest(job); /* nobody is left to use it */
        return;
    }
    bool look_at_memory = job->kind == JOB_PREFETCH && headroom_due(job);
    uint64_t wanted = claim(job, &io);
    bool direct = job->kind == JOB_READ && job->options.mode == FST_READ_DIRECT;
    pool.in_flight_direct += direct;
    unlock();

    if (job->kind == JOB_PREFETCH)
        failed = run_prefetch(job, &io, w, look_at_memory, &cold);
    else {
        uint64_t before = thread_nanoseconds();
        code = run_read(job, &io, w, direct, &refused, &error);
        fst_arena_note_fill(io.arena, wanted, thread_nanoseconds() - before);
    }
    bool moved = code == FST_OK && failed == 0;
    if (moved) count_bytes(job->kind, direct && refused == 0, wanted, cold);
    if (moved && cold > 0) fst_arena_count_ahead(io.arena, cold);

    lock();
    pool.in_flight_direct -= direct;
    job->in_flight--;
    if (refused != 0) {
        job->options.mode = FST_READ_BUFFERED;
        if (job->stats.direct_errno == 0) job->stats.direct_errno = refused;
    }
    if (code != FST_OK && job->result == FST_OK) {
        job->result = code;
        job->error = error;
    }
    if (!moved) {
        give_up_rest(job);
        return;
    }
    job->stats.bytes_done += wanted;
    job->stats.bytes_cold += cold;
    if (direct && refused == 0) job->stats.bytes_direct += wanted;
}

/* With the lock held: if nothing of the job runs or will run, finish it. It is done, for
 * whoever waits, only when it has let go of everything. */
static void finish_if_over(fst_job *job) {
    fst_file *file;
    fst_arena *arena;
    int fd;
    if (job->done || job->finishing || job->in_flight > 0 || has_chunk(job)) return;
    job->finishing = true;
    pool.finishing++;
    drop_resources(job, &file, &arena, &fd);
    bool drop = job->kind == JOB_READ && job->options.drop_cache && job->stats.bytes_direct > 0;
    unlock(); /* dropping caches and unmapping gigabytes take their time */
    if (drop) /* O_DIRECT left the cache alone; asked to drop, leave nothing behind */
        (void)FST_SYS->fadvise(file->fd, 0, 0, POSIX_FADV_DONTNEED);
    if (fd >= 0) close(fd);
    fst_file_release(file);
    fst_arena_unref(arena);
    lock();
    pool.finishing--;
    unlink_job(job);
    job->stats.bytes_skipped = job->stats.bytes_total - job->stats.bytes_done;
    job->stats.done = 1;
    job->done = true;
    if (--job->refs == 0) destroy_job(job);
    (void)pthread_cond_broadcast(&pool.event);
}

/* Reads first, since somebody waits for them, and the least served of those; then
 * read-ahead in the order asked for, which is the order of consumption. */
static fst_job *next_job(void) {
    fst_job *best = NULL;
    for (fst_job *job = pool.head; job != NULL; job = job->next) {
        if (!has_chunk(job) || job->in_flight >= job->options.threads) continue;
        if (best == NULL ||
            (job->kind == JOB_READ && (best->kind != JOB_READ || job->in_flight < best->in_flight)))
            best = job;
    }
    return best;
}

/* ---- workers ---- */

static void *worker_main(void *argument) {
    worker *w = argument;
    lock();
    for (;;) {
        fst_job *job = pool.forking > 0 ? NULL : next_job();
        if (job != NULL) {
            run_chunk(job, w);
            finish_if_over(job);
            (void)pthread_cond_broadcast(&pool.event);
            continue;
        }
        if (pool.ending > 0 && pool.forking == 0) break; /* a fork hides chunks from us */
        struct timespec until = deadline_in(IDLE_SECONDS * 1000);
        int timed_out = pthread_cond_timedwait(&pool.work, &pool.lock, &until);
        if (timed_out == ETIMEDOUT && next_job() == NULL && pool.forking == 0) break;
    }
    free_slot(w);
    w->alive = false;
    pool.threads--;
    (void)pthread_cond_broadcast(&pool.event);
    unlock();
    return NULL;
}

/* With the lock held. Workers are detached: nobody joins them, and they touch only the
 * pool, which is static. */
static bool start_worker(void) {
    worker *w = NULL;
    for (int i = 0; i < MAX_THREADS && w == NULL; i++)
        if (!pool.workers[i].alive) w = &pool.workers[i];
    if (w == NULL) return false;
    pthread_attr_t attributes;
    sigset_t all, before;
    if (pthread_attr_init(&attributes) != 0) return false;
    (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    (void)pthread_attr_setstacksize(&attributes, STACK_BYTES);
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    w->alive = true;
    int code = FST_SYS->pthread_create(&w->thread, &attributes, worker_main, w);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    (void)pthread_attr_destroy(&attributes);
    if (code != 0) {
        w->alive = false;
        return false;
    }
    pool.threads++;
    return true;
}

/* ---- fork ---- */

static void before_fork(void) {
    lock();
    pool.forking++;
    /* The device must not write into pages that the fork is about to share, and what a
     * finishing job lets go of must not stay behind in the child. */
    while (pool.in_flight_direct > 0 || pool.finishing > 0)
        (void)pthread_cond_wait(&pool.event, &pool.lock);
}

static void after_fork_parent(void) {
    pool.forking--;
    (void)pthread_cond_broadcast(&pool.work);
    (void)pthread_cond_broadcast(&pool.event);
    unlock();
}

static void init_conditions(void) {
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&pool.work, &attributes);
    (void)pthread_cond_init(&pool.event, &attributes);
    (void)pthread_condattr_destroy(&attributes);
}

/* Only the forking thread exists in the child: workers are gone, and so is whoever
 * owned the jobs. They end as cancelled and let go of what they held. */
static void after_fork_child(void) {
    (void)pthread_mutex_init(&pool.lock, NULL); /* locked by this very thread, in the parent */
    init_conditions();
    pool.forking = pool.ending = 0;
    pool.threads = pool.in_flight_direct = 0;
    for (int i = 0; i < MAX_THREADS; i++) {
        pool.workers[i].alive = false;
        free_slot(&pool.workers[i]);
    }
    lock();
    while (pool.head != NULL) {
        fst_job *job = pool.head;
        job->in_flight = 0;
        atomic_store(&job->stop, true);
        if (job->result == FST_OK)
            job->result = fst_fail(&job->error, FST_E_CANCELLED, ECANCELED,
                                   "the process forked during the load");
        give_up_rest(job);
        finish_if_over(job);
    }
    unlock();
}

static void init_pool(void) {
    init_conditions();
    (void)pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* ---- public ---- */

static bool segments_fit(const fst_segment *segments, uint64_t count, uint64_t file_bytes,
                         const fst_arena *arena, bool into_arena, uint64_t *total) {
    uint64_t previous_end = 0;
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

static int submit(enum job_kind kind, fst_file *file, fst_arena *arena, const fst_segment *segments,
                  uint64_t count, const fst_job_options *options, fst_job **out, fst_error *err) {
    uint64_t total;
    *out = NULL;
    if (options->struct_bytes != sizeof *options || options->threads < 1 ||
        options->threads > MAX_THREADS || options->chunk_bytes < CHUNK_MIN ||
        options->chunk_bytes > CHUNK_MAX || count > SIZE_MAX / sizeof *segments)
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: job options out of range", file->path);
    if (!segments_fit(segments, count, file->info.size, arena, kind == JOB_READ, &total))
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: a segment is out of range", file->path);
    (void)pthread_once(&pool_once, init_pool);

    fst_job *job = calloc(1, sizeof *job);
    fst_segment *copy = malloc(count == 0 ? 1 : (size_t)count * sizeof *copy);
    if (job == NULL || copy == NULL) {
        free(job);
        free(copy);
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "%s: no memory for a job of %llu segments",
                        file->path, (unsigned long long)count);
    }
    if (count > 0) memcpy(copy, segments, (size_t)count * sizeof *copy);
    job->kind = kind;
    job->refs = 2;
    job->direct_fd = -1;
    job->segments = copy;
    job->count = count;
    job->options = *options;
    job->options.chunk_bytes = fst_align_up(options->chunk_bytes, FST_DIRECT_ALIGN);
    job->stats.bytes_total = total;
    set_cursor(job, 0);
    fst_file_retain(file);
    fst_arena_retain(arena);
    job->file = file;
    job->arena = arena;
    if (kind == JOB_READ && options->mode == FST_READ_DIRECT) {
        job->direct_fd = fst_file_open_direct(file);
        if (job->direct_fd < 0) {
            job->stats.direct_errno = errno;
            job->options.mode = FST_READ_BUFFERED;
        }
    }

    lock();
    if (pool.tail == NULL)
        pool.head = job;
    else
        pool.tail->next = job;
    pool.tail = job;
    pool.jobs++;
    uint64_t chunks = total / job->options.chunk_bytes + 1;
    int wanted = (int)fst_min((uint64_t)job->options.threads, chunks);
    while (pool.threads < wanted && start_worker()) {
    }
    job->inline_help = pool.threads == 0;
    if (job->inline_help && kind == JOB_PREFETCH) give_up_rest(job);
    finish_if_over(job); /* nothing to do at all */
    (void)pthread_cond_broadcast(&pool.work);
    unlock();
    *out = job;
    return FST_OK;
}

int fst_job_prefetch(fst_file *file, fst_arena *map, const fst_segment *segments, uint64_t count,
                     const fst_job_options *options, fst_job **out, fst_error *err) {
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

int fst_job_wait(fst_job *job, int timeout_ms, fst_error *err) {
    struct timespec until = deadline_in(timeout_ms);
    worker helper = {0};
    lock();
    int timed_out = 0;
    while (!job->done && timed_out == 0) {
        if (job->inline_help && has_chunk(job) && pool.forking == 0) {
            run_chunk(job, &helper);
            finish_if_over(job);
            (void)pthread_cond_broadcast(&pool.event); /* a fork may wait for this chunk */
            break; /* back to the caller between chunks: it may have been interrupted */
        }
        timed_out = pthread_cond_timedwait(&pool.event, &pool.lock, &until);
    }
    int code = job->done ? job->result : FST_PENDING;
    if (code != FST_OK && code != FST_PENDING) *err = job->error;
    unlock();
    free_slot(&helper);
    return code;
}

static void cancel_locked(fst_job *job) {
    atomic_store(&job->stop, true);
    if (job->done) return;
    if (job->kind == JOB_READ && job->result == FST_OK &&
        job->stats.bytes_done < job->stats.bytes_total)
        job->result = fst_fail(&job->error, FST_E_CANCELLED, ECANCELED, "load cancelled");
    give_up_rest(job);
    finish_if_over(job);
}

void fst_job_cancel(fst_job *job) {
    if (job == NULL) return;
    lock();
    cancel_locked(job);
    unlock();
}

void fst_job_get_stats(fst_job *job, fst_job_stats *stats) {
    lock();
    *stats = job->stats;
    unlock();
}

void fst_job_release(fst_job *job) {
    if (job == NULL) return;
    lock();
    if (job->kind == JOB_READ && !job->done) {
        /* Its destination may be the caller's: nothing may be in flight after this. */
        cancel_locked(job);
        while (!job->done) (void)pthread_cond_wait(&pool.event, &pool.lock);
    }
    bool last = --job->refs == 0;
    unlock();
    if (last) destroy_job(job);
}

void fst_job_release_at(fst_job **job) {
    fst_job *held = *job;
    *job = NULL;
    fst_job_release(held);
}

void fst_pool_get_stats(fst_pool_stats *stats) {
    memset(stats, 0, sizeof *stats);
    (void)pthread_once(&pool_once, init_pool); /* else a fork now would find the lock taken */
    lock();
    stats->threads = pool.threads;
    stats->jobs = pool.jobs;
    unlock();
    stats->arenas = atomic_load(&fst_counts.arenas);
    stats->arena_bytes = atomic_load(&fst_counts.arena_bytes);
    stats->files = atomic_load(&fst_counts.files);
    stats->bytes_prefetched = atomic_load(&fst_counts.bytes_prefetched);
    stats->bytes_buffered = atomic_load(&fst_counts.bytes_buffered);
    stats->bytes_direct = atomic_load(&fst_counts.bytes_direct);
}

void fst_pool_shutdown(void) {
    (void)pthread_once(&pool_once, init_pool);
    lock();
    pool.ending++;
    (void)pthread_cond_broadcast(&pool.work);
    while (pool.threads > 0) (void)pthread_cond_wait(&pool.event, &pool.lock);
    pool.ending--;
    unlock();
}
