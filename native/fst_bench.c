/* fst_bench.c - the two measuring tools: a checksum that costs no more than reading
 * memory does, and a raw parallel read that shows what a file's storage, or the page
 * cache, can give at most.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fst_pages.h"
#include "base/fst_sys.h"

/* ---- touch -------------------------------------------------------------- */

/* Eight 64-bit lanes, two to a register: every x86-64 and aarch64 has registers of
 * 16 bytes, so this runs at memory speed without choosing code by CPU. Each lane
 * keeps Fletcher's pair: a sum, and the sum of the sums, which sees the order. */
typedef uint64_t fst_lanes __attribute__((vector_size(16)));

enum {
    TOUCH_REGISTERS = 4,
    TOUCH_BLOCK = TOUCH_REGISTERS * (int)sizeof(fst_lanes),
};

typedef struct fst_touch_state {
    fst_lanes sum[TOUCH_REGISTERS];
    fst_lanes order[TOUCH_REGISTERS];
} fst_touch_state;

/* Written out by hand: compilers keep eight named values in registers at -O2, but
 * not always two arrays of four. */
static void touch_blocks(fst_touch_state *state, const unsigned char *at, uint64_t blocks) {
    fst_lanes s0 = state->sum[0], s1 = state->sum[1], s2 = state->sum[2], s3 = state->sum[3];
    fst_lanes o0 = state->order[0], o1 = state->order[1];
    fst_lanes o2 = state->order[2], o3 = state->order[3];
    for (; blocks > 0; blocks--, at += TOUCH_BLOCK) {
        fst_lanes x[TOUCH_REGISTERS];
        memcpy(x, at, sizeof x); /* any alignment */
        s0 += x[0], o0 += s0;
        s1 += x[1], o1 += s1;
        s2 += x[2], o2 += s2;
        s3 += x[3], o3 += s3;
    }
    *state = (fst_touch_state){{s0, s1, s2, s3}, {o0, o1, o2, o3}};
}

static uint64_t touch_mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ (hash >> 32);
}

uint64_t fst_touch(const void *data, uint64_t bytes) {
    fst_touch_state state = {0};
    uint64_t blocks = bytes / TOUCH_BLOCK, tail = bytes % TOUCH_BLOCK;
    if (blocks > 0) touch_blocks(&state, data, blocks);
    if (tail > 0) { /* padded with zeros: the length, mixed in below, tells them apart */
        unsigned char last[TOUCH_BLOCK] = {0};
        memcpy(last, (const unsigned char *)data + blocks * TOUCH_BLOCK, (size_t)tail);
        touch_blocks(&state, last, 1);
    }
    uint64_t hash = touch_mix(0, bytes);
    for (int i = 0; i < TOUCH_REGISTERS; i++) { /* in lane order, so lanes cannot be swapped */
        hash = touch_mix(touch_mix(hash, state.sum[i][0]), state.order[i][0]);
        hash = touch_mix(touch_mix(hash, state.sum[i][1]), state.order[i][1]);
    }
    return hash;
}

/* ---- read ceiling ------------------------------------------------------- */

enum {
    CEILING_THREADS_MAX = 64,
    CEILING_CHUNK_MIN = 64 << 10,
    CEILING_CHUNK_MAX = 64 << 20,
};

typedef struct fst_ceiling {
    const char *path;
    uint64_t size;
    uint64_t chunk_bytes;
    bool direct;
    atomic_ullong next_chunk;
    atomic_bool stop; /* a reader failed: the others finish their chunk and leave */
} fst_ceiling;

typedef struct fst_ceiling_reader {
    pthread_t thread;
    fst_ceiling *shared;
    int fd;              /* its own: descriptors carry the kernel's read-ahead state */
    unsigned char *slot; /* chunk_bytes, reused for every chunk */
    uint64_t bytes;
    fst_error error;
} fst_ceiling_reader;

static int ceiling_read_chunk(fst_ceiling_reader *reader, uint64_t at, uint64_t end) {
    const fst_ceiling *shared = reader->shared;
    while (at < end) {
        /* O_DIRECT moves whole blocks: the last request reaches past the end of the file. */
        uint64_t want = shared->direct ? fst_align_up(end - at, FST_DIRECT_ALIGN) : end - at;
        ssize_t got = FST_SYS->pread(reader->fd, reader->slot, (size_t)want, (off_t)at);
        if (got < 0) {
            int code = errno;
            if (code == EINTR) continue;
            return fst_fail(&reader->error, FST_E_SYS, code,
                            "%s: %sreading %llu bytes at offset %llu: %s", shared->path,
                            shared->direct ? "O_DIRECT: " : "", (unsigned long long)want,
                            (unsigned long long)at, strerror(code));
        }
        uint64_t reached = at + (uint64_t)got;
        if (shared->direct && reached < end) reached = fst_align_down(reached, FST_DIRECT_ALIGN);
        if (reached == at)
            return fst_fail(&reader->error, FST_E_TRUNCATED, 0,
                            "%s: the file ends near offset %llu, but had %llu bytes when opened",
                            shared->path, (unsigned long long)at, (unsigned long long)shared->size);
        reached = fst_min(reached, end);
        reader->bytes += reached - at;
        at = reached;
    }
    return FST_OK;
}

static void *ceiling_run(void *argument) {
    fst_ceiling_reader *reader = argument;
    fst_ceiling *shared = reader->shared;
    while (!atomic_load_explicit(&shared->stop, memory_order_relaxed)) {
        uint64_t chunk = atomic_fetch_add_explicit(&shared->next_chunk, 1, memory_order_relaxed);
        uint64_t begin = chunk * shared->chunk_bytes;
        if (begin >= shared->size) break;
        uint64_t end = fst_min(begin + shared->chunk_bytes, shared->size);
        if (ceiling_read_chunk(reader, begin, end) != FST_OK) atomic_store(&shared->stop, true);
    }
    return NULL;
}

static int ceiling_open(const char *path, bool direct, int *fd, uint64_t *size, fst_error *err) {
    struct stat status;
    int opened = FST_SYS->open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (direct ? O_DIRECT : 0));
    if (opened < 0) {
        int code = errno;
        return fst_fail(err, FST_E_SYS, code, "%s: open%s failed: %s", path,
                        direct ? " with O_DIRECT" : "", strerror(code));
    }
    if (FST_SYS->fstat(opened, &status) != 0) {
        int code = errno;
        (void)close(opened); /* read-only: a failure loses nothing */
        return fst_fail(err, FST_E_SYS, code, "%s: fstat failed: %s", path, strerror(code));
    }
    if (!S_ISREG(status.st_mode)) {
        (void)close(opened);
        return fst_fail(err, FST_E_INVALID, 0, "%s: not a regular file", path);
    }
    *fd = opened;
    *size = (uint64_t)status.st_size;
    return FST_OK;
}

/* Starts `threads` readers, waits for all that started, whatever happens. The workers
 * inherit a full signal mask, so that Ctrl-C is delivered to a thread of Python's. */
static int ceiling_race(fst_ceiling_reader *readers, int threads, double *seconds, fst_error *err) {
    sigset_t all, before;
    int started = 0, result = FST_OK;
    (void)sigfillset(&all); /* cannot fail with a valid pointer */
    int masked = pthread_sigmask(SIG_SETMASK, &all, &before);
    uint64_t begin = fst_nanoseconds(CLOCK_MONOTONIC);
    for (; masked == 0 && started < threads; started++) {
        fst_ceiling_reader *reader = &readers[started];
        int code = FST_SYS->pthread_create(&reader->thread, NULL, ceiling_run, reader);
        if (code != 0) {
            atomic_store(&reader->shared->stop, true);
            result = fst_fail(err, FST_E_SYS, code, "%s: starting thread %d of %d: %s",
                              reader->shared->path, started + 1, threads, strerror(code));
            break;
        }
    }
    if (masked != 0)
        result = fst_fail(err, FST_E_SYS, masked, "%s: blocking signals: %s",
                          readers[0].shared->path, strerror(masked));
    else
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL); /* a mask the kernel gave us */
    for (int i = 0; i < started; i++) {
        int code = pthread_join(readers[i].thread, NULL);
        if (code != 0 && result == FST_OK)
            result = fst_fail(err, FST_E_SYS, code, "%s: joining thread %d: %s",
                              readers[i].shared->path, i + 1, strerror(code));
    }
    *seconds = 1e-9 * (double)(fst_nanoseconds(CLOCK_MONOTONIC) - begin);
    for (int i = 0; i < started && result == FST_OK; i++) {
        if (readers[i].error.code == FST_OK) continue;
        *err = readers[i].error;
        result = err->code;
    }
    return result;
}

/* Opens one descriptor per reader. Returns how many were opened. */
static int ceiling_prepare(fst_ceiling *shared, fst_ceiling_reader *readers, int threads,
                           unsigned char *slots, fst_error *err) {
    for (int i = 0; i < threads; i++) {
        fst_ceiling_reader *reader = &readers[i];
        reader->shared = shared;
        reader->slot = slots + (uint64_t)i * shared->chunk_bytes;
        uint64_t size = 0;
        if (ceiling_open(shared->path, shared->direct, &reader->fd, &size, err) != FST_OK) return i;
        if (i == 0) shared->size = size;
    }
    return threads;
}

int fst_read_ceiling(const char *path, int direct, int threads, uint64_t chunk_bytes,
                     uint64_t *bytes, double *seconds, fst_error *err) {
    *bytes = 0;
    *seconds = 0.0;
    if (threads < 1 || threads > CEILING_THREADS_MAX || chunk_bytes < CEILING_CHUNK_MIN ||
        chunk_bytes > CEILING_CHUNK_MAX)
        return fst_fail(err, FST_E_INVALID, EINVAL,
                        "%s: %d threads of %llu bytes: 1..%d threads of %d..%d bytes are possible",
                        path, threads, (unsigned long long)chunk_bytes, CEILING_THREADS_MAX,
                        CEILING_CHUNK_MIN, CEILING_CHUNK_MAX);
    fst_ceiling shared = {.path = path,
                          .chunk_bytes = fst_align_up(chunk_bytes, FST_DIRECT_ALIGN),
                          .direct = direct != 0};
    fst_ceiling_reader *readers = calloc((size_t)threads, sizeof *readers);
    fst_pages slots = {0};
    int opened = 0, result;
    if (readers == NULL || fst_pages_map(&slots, (uint64_t)threads * shared.chunk_bytes) != 0) {
        result = fst_fail(err, FST_E_NOMEM, ENOMEM, "%s: no memory for %d buffers of %llu bytes",
                          path, threads, (unsigned long long)shared.chunk_bytes);
        goto out;
    }
    /* Faulted in here, so that the clock sees reads and nothing else. */
    memset(slots.data, 0, (size_t)slots.bytes);
    opened = ceiling_prepare(&shared, readers, threads, slots.data, err);
    result = opened == threads ? ceiling_race(readers, threads, seconds, err) : err->code;
    for (int i = 0; i < opened; i++) *bytes += readers[i].bytes;
out:
    for (int i = 0; i < opened; i++) (void)close(readers[i].fd);
    fst_pages_unmap(&slots);
    free(readers);
    return result;
}
