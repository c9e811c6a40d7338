/* fst_bench.c - the two measuring tools: a checksum that costs no more than reading
 * memory does, and a raw parallel read that shows what a file's storage, or the page
 * cache, can give at most.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base/fst_pages.h"
#include "base/fst_sys.h"
#include "file/fst_file.h"

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
    fst_file *file;
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
    const fst_file *file = shared->file;
    while (at < end) {
        /* O_DIRECT moves whole blocks: the last request reaches past the end of the file. */
        uint64_t want = shared->direct ? fst_align_up(end - at, FST_DIRECT_ALIGN) : end - at;
        ssize_t got = FST_SYS->pread(reader->fd, reader->slot, (size_t)want, (off_t)at);
        if (got < 0) {
            if (errno == EINTR) continue;
            return fst_fail(&reader->error, FST_E_SYS, errno,
                            "%s: %sreading %llu bytes at offset %llu: %s", file->path,
                            shared->direct ? "O_DIRECT: " : "", (unsigned long long)want,
                            (unsigned long long)at, strerror(errno));
        }
        uint64_t reached = at + (uint64_t)got;
        if (shared->direct && reached < end) reached = fst_align_down(reached, FST_DIRECT_ALIGN);
        if (reached == at)
            return fst_fail(&reader->error, FST_E_TRUNCATED, 0,
                            "%s: the file ends near offset %llu, but had %llu bytes when opened",
                            file->path, (unsigned long long)at,
                            (unsigned long long)file->info.size);
        reached = fst_min(reached, end);
        reader->bytes += reached - at;
        at = reached;
    }
    return FST_OK;
}

static void *ceiling_run(void *argument) {
    fst_ceiling_reader *reader = argument;
    fst_ceiling *shared = reader->shared;
    uint64_t size = shared->file->info.size;
    while (!atomic_load_explicit(&shared->stop, memory_order_relaxed)) {
        uint64_t chunk = atomic_fetch_add_explicit(&shared->next_chunk, 1, memory_order_relaxed);
        uint64_t begin = chunk * shared->chunk_bytes;
        if (begin >= size) break;
        uint64_t end = fst_min(begin + shared->chunk_bytes, size);
        if (ceiling_read_chunk(reader, begin, end) != FST_OK) atomic_store(&shared->stop, true);
    }
    return NULL;
}

/* Starts `threads` readers and waits for all that started. They inherit a full signal mask, so that
 * Ctrl-C is delivered to a thread of Python's. */
static int ceiling_race(fst_ceiling_reader *readers, int threads, double *seconds, fst_error *err) {
    fst_ceiling *shared = readers[0].shared;
    sigset_t all, before;
    int started = 0, result = FST_OK;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    uint64_t begin = fst_nanoseconds(CLOCK_MONOTONIC);
    for (; started < threads; started++) {
        fst_ceiling_reader *reader = &readers[started];
        int code = FST_SYS->pthread_create(&reader->thread, NULL, ceiling_run, reader);
        if (code == 0) continue;
        atomic_store(&shared->stop, true);
        result = fst_fail(err, FST_E_SYS, code, "%s: starting thread %d of %d: %s",
                          shared->file->path, started + 1, threads, strerror(code));
        break;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    for (int i = 0; i < started; i++) (void)pthread_join(readers[i].thread, NULL);
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
        reader->fd =
            shared->direct ? fst_file_open_direct(shared->file) : fst_file_open_again(shared->file);
        if (reader->fd >= 0) continue;
        (void)fst_fail_call(err, shared->file->path, shared->direct ? "open with O_DIRECT" : "open",
                            errno);
        return i;
    }
    return threads;
}

int fst_read_ceiling(const char *path, int direct, int threads, uint64_t chunk_bytes,
                     uint64_t *bytes, double *seconds, fst_error *err) {
    fst_ceiling shared = {.chunk_bytes = fst_align_up(chunk_bytes, FST_DIRECT_ALIGN),
                          .direct = direct != 0};
    fst_file_info info;
    fst_pages slots = {0};
    int opened = 0, result;
    *bytes = 0;
    *seconds = 0.0;
    if (threads < 1 || threads > CEILING_THREADS_MAX || chunk_bytes < CEILING_CHUNK_MIN ||
        chunk_bytes > CEILING_CHUNK_MAX)
        return fst_fail(err, FST_E_INVALID, EINVAL,
                        "%s: %d threads of %llu bytes: 1..%d threads of %d..%d bytes are possible",
                        path, threads, (unsigned long long)chunk_bytes, CEILING_THREADS_MAX,
                        CEILING_CHUNK_MIN, CEILING_CHUNK_MAX);
    if (fst_file_open(path, &shared.file, &info, err) != FST_OK) return err->code;
    fst_ceiling_reader *readers = calloc((size_t)threads, sizeof *readers);
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
    fst_file_release(&shared.file);
    return result;
}
