/* fst_sys.h - the system calls that tests can make fail, in one table.
 *
 * Two tables exist: the real one, and one that consults the faults set with
 * fst_fault_set first. Which is in force is one atomic pointer, so a test can inject
 * a fault while workers run. The real table costs one load and an indirect call.
 *
 * Not in the table: close and munmap, whose failure is ignored; fstatfs, getrusage, mbind and CPU
 * affinity, whose failure means "unknown" or "not placed"; access, and fcntl and dup2 beside
 * cuFile; clocks and thread synchronisation; settings under /proc and /sys, where a missing file
 * means the same as a failed open.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Name, result, result of a failure, parameters, arguments. Injected faults may also cut reads
 * short. cachestat returns how many pages of the range are resident, fadvise fails with errno, and
 * pthread_create returns its error. */
#define FST_SYS_READS(CALL)                                                                        \
    CALL(pread, ssize_t, -1, (int fd, void *to, size_t bytes, off_t offset),                       \
         (fd, to, bytes, offset))                                                                  \
    CALL(preadv, ssize_t, -1, (int fd, const struct iovec *to, int count, off_t offset),           \
         (fd, to, count, offset))
#define FST_SYS_OTHERS(CALL)                                                                       \
    CALL(open, int, -1, (const char *path, int flags), (path, flags))                              \
    CALL(stat, int, -1, (const char *path, struct stat *out), (path, out))                         \
    CALL(fstat, int, -1, (int fd, struct stat *out), (fd, out))                                    \
    CALL(preadv2, ssize_t, -1,                                                                     \
         (int fd, const struct iovec *to, int count, off_t offset, int flags),                     \
         (fd, to, count, offset, flags))                                                           \
    CALL(mmap, void *, MAP_FAILED,                                                                 \
         (void *hint, size_t bytes, int protection, int flags, int fd, off_t offset),              \
         (hint, bytes, protection, flags, fd, offset))                                             \
    CALL(madvise, int, -1, (void *address, size_t bytes, int advice), (address, bytes, advice))    \
    CALL(readahead, ssize_t, -1, (int fd, off_t offset, size_t bytes), (fd, offset, bytes))        \
    CALL(cachestat, long long, -1, (int fd, unsigned long long offset, unsigned long long bytes),  \
         (fd, offset, bytes))                                                                      \
    CALL(mincore, int, -1, (void *address, size_t bytes, unsigned char *out),                      \
         (address, bytes, out))                                                                    \
    CALL(fadvise, int, -1, (int fd, off_t offset, off_t bytes, int advice),                        \
         (fd, offset, bytes, advice))                                                              \
    CALL(pthread_create, int, errno,                                                               \
         (pthread_t * thread, const pthread_attr_t *attributes, void *(*start)(void *),            \
          void *argument),                                                                         \
         (thread, attributes, start, argument))
#define FST_SYS_CALLS(CALL) FST_SYS_READS(CALL) FST_SYS_OTHERS(CALL)

#define FST_SYS_FIELD(name, result, failed, parameters, arguments) result(*name) parameters;
typedef struct fst_sys_table {
    FST_SYS_CALLS(FST_SYS_FIELD)
} fst_sys_table;
#undef FST_SYS_FIELD

extern _Atomic(const fst_sys_table *) fst_sys_in_force;

#define FST_SYS (atomic_load_explicit(&fst_sys_in_force, memory_order_acquire))

/* The number with which a file of /proc or /sys begins; false: there is no such file or number. */
__attribute__((format(printf, 2, 3))) bool fst_read_number(long long *out, const char *format, ...);
