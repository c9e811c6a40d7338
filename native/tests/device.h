/* device.h - loads to the fake device, and what must hold when a case is over.
 *
 * Device memory of the fake is host memory: what a case sees through fst_arena_data is what a
 * kernel would see at that moment. RUN_ON checks, beside what RUN does, that nothing of the
 * driver is left over and that no rule of its API was broken.
 */
#ifndef FST_TEST_DEVICE_H
#define FST_TEST_DEVICE_H

#include "test.h"

#include <pthread.h>

#include "device/fst_gpu.h"
#include "fake_open.h"
#include "tensor/fst_arena.h"

enum {
    DEVICES = 3,
    SLOT_BYTES = 64 << 10, /* of options_to: the smallest chunk */
    SALTS = 16,            /* of files: less than this */
    NO_LIMIT = 64 << 20    /* more than any case pins */
};

static int device_kind = FST_GPU_CUDA; /* cases run with either */
static fst_device *device_table[2][DEVICES];
static uintptr_t device_streams[DEVICES]; /* the allocator's */
static fake_counts device_before;

static inline fst_device *device_at(int ordinal) { return device_table[device_kind][ordinal]; }

/* ---- before and after each case ---- */

static inline void device_open_all(void) {
    fst_error err = {0};
    if (device_table[0][0] == NULL) FAKE(fake_devices)(DEVICES); /* loads it before the pool */
    for (int i = 0; i < DEVICES; i++) {
        int code =
            fst_device_open(device_kind, fake_path(), i, &device_table[device_kind][i], &err);
        if (code != FST_OK) (void)fprintf(stderr, "%s\n", err.message);
        MUST(code == FST_OK);
        if (device_streams[i] == 0) device_streams[i] = FAKE(fake_stream)(i);
    }
}

static inline int spare_events(void) {
    uint64_t count = 0;
    for (int kind = 0; kind < 2; kind++)
        for (int i = 0; i < DEVICES; i++)
            if (device_table[kind][i] != NULL) count += device_table[kind][i]->events_count;
    return (int)count;
}

static inline bool check_violations(void) {
    uint64_t count = FAKE(fake_violations)();
    for (uint64_t i = 0; i < count && i < 8; i++)
        (void)fprintf(stderr, "    %s\n", FAKE(fake_violation_text)(i));
    return CHECK_EQ(count, 0);
}

static inline void device_begin(void) {
    device_open_all();
    FAKE(fake_clear)();
    FAKE(fake_live)(&device_before);
}

/* With the pool shut down and all arenas released. */
static inline void device_check(void) {
    fake_counts now;
    fst_pool_stats stats;
    FAKE(fake_drain)();
    FAKE(fake_live)(&now);
    fst_pool_get_stats(&stats);
    CHECK_EQ(now.contexts, device_before.contexts);
    CHECK_EQ(now.streams, device_before.streams);
    CHECK_EQ(now.ranges, device_before.ranges);
    CHECK_EQ(now.blocks, device_before.blocks);
    CHECK_EQ(now.events, spare_events());
    CHECK_EQ(stats.pinned_bytes, 0);
    (void)check_violations();
}

#define RUN_ON(function)                                                                           \
    do {                                                                                           \
        device_begin();                                                                            \
        RUN(function);                                                                             \
        device_check();                                                                            \
    } while (0)

/* ---- memory ---- */

/* A block as torch hands it out: work that fills it with FAKE_LATE is pending. */
static inline fst_arena *device_arena(uint64_t bytes, int ordinal) {
    void *managed = NULL;
    fst_arena *arena = NULL;
    fst_error err = {0};
    MUST(FAKE(fake_block)(bytes == 0 ? 1 : bytes, ordinal, device_streams[ordinal], &managed) == 0);
    MUST(fst_arena_adopt((uintptr_t)managed, &arena, &err) == FST_OK);
    return arena;
}

/* What files of a salt hold; made once, since sanitizers make loops slow. Not thread-local: a
 * worker's stack, which such data would be part of, is small. */
static inline const unsigned char *content_of(const test_file *file) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static _Alignas(4096) unsigned char content[SALTS][2 << 20]; /* chunks begin as in a file */
    static uint64_t sizes[SALTS];
    uint64_t salt = file->salt;
    MUST(salt < SALTS && file->size <= sizeof *content);
    (void)pthread_mutex_lock(&lock);
    for (; sizes[salt] < file->size; sizes[salt]++)
        content[salt][sizes[salt]] = test_byte(sizes[salt], salt);
    (void)pthread_mutex_unlock(&lock);
    return content[salt];
}

/* The segments' bytes below a file offset are the file's. */
static inline bool segments_right(const test_file *file, const fst_arena *arena,
                                  const fst_segment *segments, uint64_t count, uint64_t until) {
    const unsigned char *content = content_of(file);
    for (uint64_t i = 0; i < count && segments[i].file_offset < until; i++) {
        const fst_segment *s = &segments[i];
        uint64_t bytes = fst_min(s->bytes, until - s->file_offset);
        if (memcmp(arena->data + s->arena_offset, content + s->file_offset, bytes) != 0)
            return false;
    }
    return true;
}

/* Nothing but the segments was written to, since the allocator's work ran; and zeros only to
 * what may be taken for padding. */
static inline bool rest_untouched(const fst_arena *arena, const fst_segment *segments,
                                  uint64_t count) {
    enum {
        REST,
        COVERED,
        PADDING
    };
    bool untouched = true;
    uint64_t end = UINT64_MAX;
    unsigned char *what = calloc(1, arena->bytes);
    MUST(what != NULL);
    for (uint64_t i = 0; i < count; i++) {
        const fst_segment *s = &segments[i];
        if (s->bytes == 0) continue;
        if (s->arena_offset > end && s->arena_offset - end < 256)
            memset(what + end, PADDING, s->arena_offset - end);
        end = s->arena_offset + s->bytes;
    }
    for (uint64_t i = 0; i < count; i++)
        memset(what + segments[i].arena_offset, COVERED, segments[i].bytes);
    for (uint64_t i = 0; i < arena->bytes; i++)
        if (what[i] != COVERED && arena->data[i] != FAKE_LATE &&
            !(what[i] == PADDING && arena->data[i] == 0))
            untouched = false;
    free(what);
    return untouched;
}

/* ---- jobs ---- */

static inline fst_job_options options_to(int ordinal, int mode) {
    return (fst_job_options){.struct_bytes = sizeof(fst_job_options),
                             .threads = 3,
                             .chunk_bytes = SLOT_BYTES,
                             .mode = mode,
                             .device = device_at(ordinal),
                             .stream = device_streams[ordinal],
                             .pinned_bytes = NO_LIMIT};
}

static inline int job_result(fst_job *job, fst_error *err) {
    int code;
    while ((code = fst_job_wait(job, 1000, err)) == FST_PENDING) {
    }
    CHECK(code == FST_OK || (err->code == code && err->message[0] != '\0'));
    return code;
}

/* A load of a whole file to device 0, or where the options say; or of the same bytes from
 * memory. */
typedef struct device_load {
    test_file made;
    bool upload;
    fst_file *file;
    fst_arena *arena;
    fst_job *job;
    fst_segment all;
    fst_error err;
} device_load;

/* What the job calls the file's offset 0. */
static inline uint64_t device_origin(const device_load *l) {
    return l->upload ? (uintptr_t)content_of(&l->made) : 0;
}

static inline int device_start(device_load *l, const fst_job_options *options) {
    l->file = test_open(&l->made);
    l->arena = device_arena(l->made.size, options->device->ordinal);
    l->all = (fst_segment){0, l->made.size, 0};
    fst_segment source = {device_origin(l), l->made.size, 0};
    return l->upload ? fst_job_upload(l->arena, &source, 1, options, &l->job, &l->err)
                     : fst_job_read(l->file, l->arena, &source, 1, options, &l->job, &l->err);
}

/* Like fst_job_wait_until, but by file offset for uploads, too. */
static inline int device_wait_until(device_load *l, uint64_t offset, int timeout_ms) {
    if (offset != UINT64_MAX) offset += device_origin(l);
    return fst_job_wait_until(l->job, offset, timeout_ms, &l->err);
}

/* Whether the whole file arrived, and stays when all pending work has run. */
static inline bool device_right(const device_load *l) {
    if (!segments_right(&l->made, l->arena, &l->all, 1, l->made.size)) return false;
    FAKE(fake_drain)();
    return segments_right(&l->made, l->arena, &l->all, 1, l->made.size);
}

static inline void device_end(device_load *l) { /* the file itself is the caller's */
    fst_job_release(&l->job);
    fst_arena_release(&l->arena);
    fst_file_release(&l->file);
    l->job = NULL;
    l->arena = NULL;
    l->file = NULL;
}

/* All of it; returns the job's result and checks the bytes when that is FST_OK. */
static inline int device_run_once(device_load *l, const fst_job_options *options,
                                  fst_job_stats *stats) {
    int code = device_start(l, options);
    if (code == FST_OK) {
        code = job_result(l->job, &l->err);
        fst_job_get_stats(l->job, stats);
        CHECK(stats->done && stats->bytes_done + stats->bytes_skipped == l->made.size);
    }
    if (code == FST_OK) CHECK(device_right(l));
    device_end(l);
    return code;
}

static inline int device_load_once(const test_file *made, const fst_job_options *options,
                                   fst_job_stats *stats) {
    device_load l = {.made = *made};
    return device_run_once(&l, options, stats);
}

static inline int device_upload_once(const test_file *made, const fst_job_options *options,
                                     fst_job_stats *stats) {
    device_load l = {.made = *made, .upload = true};
    return device_run_once(&l, options, stats);
}

#endif
