/* fst_sys.c - the system-call table and its fault-injecting twin. */
#define _GNU_SOURCE
#include "fst_sys.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fst_internal.h"

/* Linux 6.5; older C libraries know neither the number nor the structs. */
#define FST_NR_CACHESTAT 451

struct cachestat_range_abi {
    uint64_t offset;
    uint64_t bytes;
};

struct cachestat_abi {
    uint64_t cached;
    uint64_t dirty;
    uint64_t writeback;
    uint64_t evicted;
    uint64_t recently_evicted;
};

static int real_open(const char *path, int flags) { return open(path, flags); }

static int real_stat(const char *path, struct stat *out) { return stat(path, out); }

static int real_fstat(int fd, struct stat *out) { return fstat(fd, out); }

static long long real_cachestat(int fd, unsigned long long offset, unsigned long long bytes) {
    struct cachestat_range_abi range = {offset, bytes};
    struct cachestat_abi out;
    memset(&out, 0, sizeof out);
    if (syscall(FST_NR_CACHESTAT, fd, &range, &out, 0) != 0) return -1;
    return (long long)out.cached;
}

static int real_fadvise(int fd, off_t offset, off_t bytes, int advice) {
    int code = posix_fadvise(fd, offset, bytes, advice);
    if (code == 0) return 0;
    errno = code;
    return -1;
}

static const fst_sys_table real_table = {
    .open = real_open,
    .stat = real_stat,
    .fstat = real_fstat,
    .pread = pread,
    .preadv = preadv,
    .preadv2 = preadv2,
    .mmap = mmap,
    .madvise = madvise,
    .readahead = readahead,
    .cachestat = real_cachestat,
    .mincore = mincore,
    .fadvise = real_fadvise,
    .pthread_create = pthread_create,
};

_Atomic(const fst_sys_table *) fst_sys_in_force = &real_table;

/* ---- the faulting twin ---- */

enum fault_call {
    CALL_OPEN,
    CALL_STAT,
    CALL_FSTAT,
    CALL_PREAD,
    CALL_PREADV,
    CALL_PREADV2,
    CALL_MMAP,
    CALL_MADVISE,
    CALL_READAHEAD,
    CALL_CACHESTAT,
    CALL_MINCORE,
    CALL_FADVISE,
    CALL_PTHREAD_CREATE,
    CALLS
};

static const char *const call_names[CALLS] = {
    "open",    "stat",      "fstat",     "pread",   "preadv",  "preadv2",        "mmap",
    "madvise", "readahead", "cachestat", "mincore", "fadvise", "pthread_create",
};

static struct fault {
    atomic_ullong calls;
    atomic_ullong first; /* 0: no fault set */
    atomic_ullong last;
    atomic_int sys_errno;
    atomic_ullong short_bytes;
} faults[CALLS];

/* 0: make the call as it is; 1: cut it short; -1: fail, errno is set. */
static int fault_for(enum fault_call call) {
    struct fault *fault = &faults[call];
    uint64_t number = atomic_fetch_add(&fault->calls, 1) + 1;
    uint64_t first = atomic_load(&fault->first);
    if (first == 0 || number < first || number > atomic_load(&fault->last)) return 0;
    int code = atomic_load(&fault->sys_errno);
    if (code == 0) return 1;
    errno = code;
    return -1;
}

/* Cuts a read short after the fact, since O_DIRECT refuses odd lengths, and spoils what lies
 * behind the cut, as a device may. */
static ssize_t cut_short(enum fault_call call, const struct iovec *to, int count, ssize_t got) {
    uint64_t most = atomic_load(&faults[call].short_bytes), at = 0;
    if (got < 0 || (uint64_t)got <= most) return got;
    for (int i = 0; i < count; at += to[i++].iov_len) {
        uint64_t keep = most > at ? fst_min(most - at, to[i].iov_len) : 0;
        uint64_t filled = (uint64_t)got > at ? fst_min((uint64_t)got - at, to[i].iov_len) : 0;
        if (filled > keep) memset((char *)to[i].iov_base + keep, 0xA5, (size_t)(filled - keep));
    }
    return (ssize_t)most;
}

static int faulty_open(const char *path, int flags) {
    return fault_for(CALL_OPEN) < 0 ? -1 : real_open(path, flags);
}

static int faulty_stat(const char *path, struct stat *out) {
    return fault_for(CALL_STAT) < 0 ? -1 : real_stat(path, out);
}

static int faulty_fstat(int fd, struct stat *out) {
    return fault_for(CALL_FSTAT) < 0 ? -1 : real_fstat(fd, out);
}

static ssize_t faulty_pread(int fd, void *to, size_t bytes, off_t offset) {
    int fault = fault_for(CALL_PREAD);
    if (fault < 0) return -1;
    ssize_t got = pread(fd, to, bytes, offset);
    const struct iovec all = {to, bytes};
    return fault == 0 ? got : cut_short(CALL_PREAD, &all, 1, got);
}

static ssize_t faulty_preadv(int fd, const struct iovec *to, int count, off_t offset) {
    int fault = fault_for(CALL_PREADV);
    if (fault < 0) return -1;
    ssize_t got = preadv(fd, to, count, offset);
    return fault == 0 ? got : cut_short(CALL_PREADV, to, count, got);
}

static ssize_t faulty_preadv2(int fd, const struct iovec *to, int count, off_t offset, int flags) {
    return fault_for(CALL_PREADV2) < 0 ? -1 : preadv2(fd, to, count, offset, flags);
}

static void *faulty_mmap(void *hint, size_t bytes, int protection, int flags, int fd,
                         off_t offset) {
    return fault_for(CALL_MMAP) < 0 ? MAP_FAILED : mmap(hint, bytes, protection, flags, fd, offset);
}

static int faulty_madvise(void *address, size_t bytes, int advice) {
    return fault_for(CALL_MADVISE) < 0 ? -1 : madvise(address, bytes, advice);
}

static ssize_t faulty_readahead(int fd, off_t offset, size_t bytes) {
    return fault_for(CALL_READAHEAD) < 0 ? -1 : readahead(fd, offset, bytes);
}

static long long faulty_cachestat(int fd, unsigned long long offset, unsigned long long bytes) {
    return fault_for(CALL_CACHESTAT) < 0 ? -1 : real_cachestat(fd, offset, bytes);
}

static int faulty_mincore(void *address, size_t bytes, unsigned char *out) {
    return fault_for(CALL_MINCORE) < 0 ? -1 : mincore(address, bytes, out);
}

static int faulty_fadvise(int fd, off_t offset, off_t bytes, int advice) {
    return fault_for(CALL_FADVISE) < 0 ? -1 : real_fadvise(fd, offset, bytes, advice);
}

static int faulty_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                                 void *(*start)(void *), void *argument) {
    if (fault_for(CALL_PTHREAD_CREATE) < 0) return errno; /* pthread_create returns its error */
    return pthread_create(thread, attributes, start, argument);
}

static const fst_sys_table faulty_table = {
    .open = faulty_open,
    .stat = faulty_stat,
    .fstat = faulty_fstat,
    .pread = faulty_pread,
    .preadv = faulty_preadv,
    .preadv2 = faulty_preadv2,
    .mmap = faulty_mmap,
    .madvise = faulty_madvise,
    .readahead = faulty_readahead,
    .cachestat = faulty_cachestat,
    .mincore = faulty_mincore,
    .fadvise = faulty_fadvise,
    .pthread_create = faulty_pthread_create,
};

static int call_index(const char *name) {
    for (int i = 0; i < CALLS; i++)
        if (strcmp(name, call_names[i]) == 0) return i;
    return -1;
}

int fst_fault_set(const char *name, uint64_t first, uint64_t count, int sys_errno,
                  uint64_t short_bytes) {
    int call = call_index(name);
    if (call < 0) return -1;
    struct fault *fault = &faults[call];
    atomic_store(&fault->first, 0); /* disarmed while it changes */
    atomic_store(&fault->calls, 0);
    atomic_store(&fault->last, count > UINT64_MAX - first ? UINT64_MAX : first + count - 1);
    atomic_store(&fault->sys_errno, sys_errno);
    atomic_store(&fault->short_bytes, short_bytes);
    atomic_store(&fault->first, first);
    atomic_store_explicit(&fst_sys_in_force, &faulty_table, memory_order_release);
    return 0;
}

uint64_t fst_fault_calls(const char *name) {
    int call = call_index(name);
    return call < 0 ? 0 : atomic_load(&faults[call].calls);
}

void fst_fault_clear(void) {
    atomic_store_explicit(&fst_sys_in_force, &real_table, memory_order_release);
    for (int i = 0; i < CALLS; i++) {
        atomic_store(&faults[i].first, 0);
        atomic_store(&faults[i].calls, 0);
    }
}
