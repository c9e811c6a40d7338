/* fst_sys.c - the system-call table and its fault-injecting twin. */
#include "base/fst_sys.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/fst_base.h"

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

#define real_stat stat
#define real_fstat fstat
#define real_pread pread
#define real_preadv preadv
#define real_preadv2 preadv2
#define real_mmap mmap
#define real_madvise madvise
#define real_readahead readahead
#define real_mincore mincore
#define real_pthread_create pthread_create

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

#define REAL(name, result, failed, parameters, arguments) .name = real_##name,
static const fst_sys_table real_table = {FST_SYS_CALLS(REAL)};
#undef REAL

_Atomic(const fst_sys_table *) fst_sys_in_force = &real_table;

bool fst_read_number(long long *out, const char *format, ...) {
    char path[PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(path, sizeof path, format, arguments);
    va_end(arguments);
    FILE *file = length < 0 || (size_t)length >= sizeof path ? NULL : fopen(path, "re");
    if (file == NULL) return false;
    bool found = fscanf(file, "%lld", out) == 1;
    (void)fclose(file);
    return found;
}

/* ---- the faulting twin ---- */

#define NUMBER(name, result, failed, parameters, arguments) CALL_##name,
enum fault_call {
    FST_SYS_CALLS(NUMBER) CALLS
};
#undef NUMBER

#define NAME(name, result, failed, parameters, arguments) #name,
static const char *const call_names[CALLS] = {FST_SYS_CALLS(NAME)};
#undef NAME

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

static ssize_t faulty_pread(int fd, void *to, size_t bytes, off_t offset) {
    int fault = fault_for(CALL_pread);
    if (fault < 0) return -1;
    ssize_t got = pread(fd, to, bytes, offset);
    const struct iovec all = {to, bytes};
    return fault == 0 ? got : cut_short(CALL_pread, &all, 1, got);
}

static ssize_t faulty_preadv(int fd, const struct iovec *to, int count, off_t offset) {
    int fault = fault_for(CALL_preadv);
    if (fault < 0) return -1;
    ssize_t got = preadv(fd, to, count, offset);
    return fault == 0 ? got : cut_short(CALL_preadv, to, count, got);
}

#define FAULTY(name, result, failed, parameters, arguments)                                        \
    static result faulty_##name parameters {                                                       \
        return fault_for(CALL_##name) < 0 ? failed : real_##name arguments;                        \
    }
FST_SYS_OTHERS(FAULTY)
#undef FAULTY

#define TWIN(name, result, failed, parameters, arguments) .name = faulty_##name,
static const fst_sys_table faulty_table = {FST_SYS_CALLS(TWIN)};
#undef TWIN

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
