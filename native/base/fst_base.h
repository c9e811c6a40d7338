/* fst_base.h - what every file uses: errors, counters, byte arithmetic, clocks.
 *
 * Ownership and threading are drawn in fst.h. These mutexes exist; no thread holds two at once:
 *
 *   fst_queue.lock        the list of jobs, the state of each job, the pool's threads
 *   ring.lock             pinned slots: the spare ones and the totals (fst_ring.c)
 *   gds.lock              the one attempt to open cuFile, spare staging blocks (fst_gds.c)
 *   registry              driver libraries and devices (fst_gpu.c)
 *   fst_device.lock       a device's spare events
 *
 * gds.lock and registry are held while a driver is opened, which takes seconds; the others never
 * across a call that can block. Reference counts of arenas and files, and the counters below, are
 * atomics, so a tensor's deleter needs no lock.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#include "fst.h"

__attribute__((format(printf, 4, 5))) void fst_set_error(fst_error *err, int code, int sys_errno,
                                                         const char *format, ...);
/* Fills *err and gives its code. A macro, so that gcc's analyzer sees in each caller which code. */
#define fst_fail(err, code, ...) (fst_set_error((err), (code), __VA_ARGS__), (code))
/* Fills *err and returns its code: FST_E_SYS for a system call that failed with sys_errno on a
 * path. */
int fst_fail_call(fst_error *err, const char *path, const char *call, int sys_errno);

typedef struct fst_counters { /* of the process, shown by fst_pool_get_stats */
    atomic_ullong arenas;
    atomic_ullong arena_bytes;
    atomic_ullong files;
    atomic_ullong fed_files;
    atomic_ullong bytes_ahead; /* read ahead for maps that are still in use */
    atomic_ullong bytes_prefetched;
    atomic_ullong bytes_buffered;
    atomic_ullong bytes_direct;
    atomic_ullong bytes_fed;
    atomic_ullong bytes_copied; /* to devices */
    atomic_ullong bytes_uploaded;
} fst_counters;

extern fst_counters fst_counts;

#define FST_DIRECT_ALIGN 4096u /* enough for O_DIRECT on every file system met */
#define FST_HUGE_PAGE (2u << 20)

static inline uint64_t fst_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t fst_align_down(uint64_t n, uint64_t to) { return n - n % to; }
static inline uint64_t fst_align_up(uint64_t n, uint64_t to) {
    return fst_align_down(n + (to - 1), to); /* callers keep n below 2^63 */
}

/* The kernel's page: 4 KiB on x86_64, up to 64 KiB on aarch64. */
static inline uint64_t fst_page(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

static inline uint64_t fst_nanoseconds(clockid_t clock) { /* 0 where there is no such clock */
    struct timespec now;
    if (clock_gettime(clock, &now) != 0) return 0;
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
