/* gate.h - loads whose system calls wait at a gate, so that cases need no luck with timing.
 *
 * gate_install puts a table of system calls in force in which every read, and every chunk
 * of read-ahead, waits until gate_allow lets it go on. gate_remove opens it for good.
 */
#ifndef FST_GATE_H
#define FST_GATE_H

#include "test.h"

#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include "base/fst_sys.h"

enum {
    CHUNK = 64 << 10,
    CHUNKS = 16,
    BYTES = CHUNK * CHUNKS
};

/* ---- the gate ---- */

enum {
    OPEN = INT_MAX,
    ENTRIES = 256,
    AHEAD_FD = -1
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int allowed; /* calls that may go on */
    int inside;  /* calls waiting */
    int passed;
    int entered;
    int fds[ENTRIES]; /* who entered, in order; AHEAD_FD: read-ahead of a map */
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static const fst_sys_table *real_calls;
static fst_sys_table gated_calls;

static inline void gate_pass(int fd) {
    (void)pthread_mutex_lock(&gate.lock);
    if (gate.entered < ENTRIES) gate.fds[gate.entered] = fd;
    gate.entered++;
    gate.inside++;
    (void)pthread_cond_broadcast(&gate.changed);
    while (gate.allowed == 0) (void)pthread_cond_wait(&gate.changed, &gate.lock);
    if (gate.allowed != OPEN) gate.allowed--;
    gate.inside--;
    gate.passed++;
    (void)pthread_cond_broadcast(&gate.changed);
    (void)pthread_mutex_unlock(&gate.lock);
}

static inline ssize_t gated_pread(int fd, void *to, size_t bytes, off_t offset) {
    gate_pass(fd);
    return pread(fd, to, bytes, offset);
}

static inline ssize_t gated_preadv(int fd, const struct iovec *to, int count, off_t offset) {
    gate_pass(fd);
    return preadv(fd, to, count, offset);
}

static inline int gated_madvise(void *address, size_t bytes, int advice) {
    if (advice != 22) return 0; /* MADV_POPULATE_READ is what read-ahead waits in */
    gate_pass(AHEAD_FD);
    (void)address;
    (void)bytes;
    return 0;
}

/* Buffered reads fill the cache by readahead then, which passes, and wait in their reads only. */
static inline void *no_shared_map(void *hint, size_t bytes, int protection, int flags, int fd,
                                  off_t offset) {
    if ((flags & MAP_SHARED) == 0) return mmap(hint, bytes, protection, flags, fd, offset);
    errno = ENODEV;
    return MAP_FAILED;
}

/* Nothing tells what is cached, so read-ahead works on every chunk. */
static inline long long no_cachestat(int fd, unsigned long long offset, unsigned long long bytes) {
    (void)fd, (void)offset, (void)bytes;
    errno = ENOSYS;
    return -1;
}

static inline ssize_t no_preadv2(int fd, const struct iovec *to, int count, off_t offset,
                                 int flags) {
    (void)fd, (void)to, (void)count, (void)offset, (void)flags;
    errno = EOPNOTSUPP;
    return -1;
}

static inline int no_mincore(void *address, size_t bytes, unsigned char *out) {
    (void)address, (void)bytes, (void)out;
    errno = ENOSYS;
    return -1;
}

/* In place of the other for uploads, which look once at every chunk before they copy it. */
static inline int gated_mincore(void *address, size_t bytes, unsigned char *out) {
    gate_pass(AHEAD_FD);
    return no_mincore(address, bytes, out);
}

static inline int no_thread(pthread_t *thread, const pthread_attr_t *attributes,
                            void *(*start)(void *), void *argument) {
    (void)thread, (void)attributes, (void)start, (void)argument;
    return EAGAIN;
}

static inline void gate_install(bool threads) {
    if (real_calls == NULL) real_calls = FST_SYS;
    gated_calls = *real_calls;
    gated_calls.pread = gated_pread;
    gated_calls.preadv = gated_preadv;
    gated_calls.madvise = gated_madvise;
    gated_calls.mmap = no_shared_map;
    gated_calls.cachestat = no_cachestat;
    gated_calls.preadv2 = no_preadv2;
    gated_calls.mincore = no_mincore;
    if (!threads) gated_calls.pthread_create = no_thread;
    gate.allowed = gate.inside = gate.passed = gate.entered = 0;
    atomic_store(&fst_sys_in_force, &gated_calls);
}

static inline void gate_allow(int calls) {
    (void)pthread_mutex_lock(&gate.lock);
    gate.allowed = calls == OPEN ? OPEN : gate.allowed + calls;
    (void)pthread_cond_broadcast(&gate.changed);
    (void)pthread_mutex_unlock(&gate.lock);
}

static inline void gate_wait(int passed, int inside) { /* until at least so many */
    (void)pthread_mutex_lock(&gate.lock);
    while (gate.passed < passed || gate.inside < inside)
        (void)pthread_cond_wait(&gate.changed, &gate.lock);
    (void)pthread_mutex_unlock(&gate.lock);
}

static inline int gate_inside(void) {
    (void)pthread_mutex_lock(&gate.lock);
    int inside = gate.inside;
    (void)pthread_mutex_unlock(&gate.lock);
    return inside;
}

static inline void gate_remove(void) {
    gate_allow(OPEN);
    atomic_store(&fst_sys_in_force, real_calls);
}

static inline void nap(void) { /* to be polite in a loop, never to order anything */
    struct timespec pause = {0, 1000000};
    (void)nanosleep(&pause, NULL);
}

/* ---- loads ---- */

typedef struct load {
    test_file made;
    fst_file *file;
    fst_arena *arena;
    fst_job *job;
    int fd;
} load;

static inline load start_load(uint64_t salt, int mode, int threads) {
    load l = {.made = test_create(BYTES, salt)};
    fst_error err = {0};
    fst_file_info info;
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = {
        .struct_bytes = sizeof options, .threads = threads, .chunk_bytes = CHUNK, .mode = mode};
    MUST(fst_file_open(l.made.path, &l.file, &info, &err) == FST_OK);
    l.fd = info.fd;
    MUST(fst_arena_alloc(BYTES, &l.arena, &err) == FST_OK);
    MUST(fst_job_read(l.file, l.arena, &all, 1, &options, &l.job, &err) == FST_OK);
    return l;
}

static inline load start_prefetch(uint64_t salt, int threads) {
    load l = {.made = test_create(BYTES, salt)};
    fst_error err = {0};
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = {
        .struct_bytes = sizeof options, .threads = threads, .chunk_bytes = CHUNK};
    l.file = test_open(&l.made);
    MUST(fst_arena_map(l.file, &l.arena, &err) == FST_OK);
    MUST(fst_job_prefetch(l.file, l.arena, &all, 1, &options, &l.job, &err) == FST_OK);
    return l;
}

static inline int wait_for(fst_job *job) {
    fst_error err = {0};
    int code;
    while ((code = fst_job_wait(job, 100, &err)) == FST_PENDING) {
    }
    CHECK(code == FST_OK || (err.code == code && err.message[0] != '\0'));
    return code;
}

static inline bool bytes_right(const load *l) {
    const unsigned char *bytes = fst_arena_data(l->arena);
    for (uint64_t i = 0; i < BYTES; i++)
        if (bytes[i] != test_byte(i, l->made.salt)) return false;
    return true;
}

static inline fst_job_stats stats_of(fst_job *job) {
    fst_job_stats stats;
    fst_job_get_stats(job, &stats);
    return stats;
}

static inline void end_load(load *l) {
    fst_job_release(&l->job);
    fst_arena_release(&l->arena);
    fst_file_release(&l->file);
    test_remove(&l->made);
}

#endif
