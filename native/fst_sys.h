/* fst_sys.h - every system call the engine makes on files and memory, in one table.
 *
 * Two tables exist: the real one, and one that consults the faults set with
 * fst_fault_set first. Which is in force is one atomic pointer, so a test can inject
 * a fault while workers run. The real table costs one load and an indirect call.
 */
#ifndef FST_SYS_H
#define FST_SYS_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef struct fst_sys_table {
    int (*open)(const char *path, int flags);
    int (*stat)(const char *path, struct stat *out);
    int (*fstat)(int fd, struct stat *out);
    ssize_t (*pread)(int fd, void *to, size_t bytes, off_t offset);
    ssize_t (*preadv)(int fd, const struct iovec *to, int count, off_t offset);
    ssize_t (*preadv2)(int fd, const struct iovec *to, int count, off_t offset, int flags);
    void *(*mmap)(void *hint, size_t bytes, int protection, int flags, int fd, off_t offset);
    int (*madvise)(void *address, size_t bytes, int advice);
    ssize_t (*readahead)(int fd, off_t offset, size_t bytes);
    /* pages resident in [offset, offset + bytes), or -1 with errno */
    long long (*cachestat)(int fd, unsigned long long offset, unsigned long long bytes);
    int (*mincore)(void *address, size_t bytes, unsigned char *out);
    int (*fadvise)(int fd, off_t offset, off_t bytes, int advice); /* -1 with errno */
    int (*pthread_create)(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*start)(void *), void *argument);
} fst_sys_table;

extern _Atomic(const fst_sys_table *) fst_sys_in_force;

#define FST_SYS (atomic_load_explicit(&fst_sys_in_force, memory_order_acquire))

#endif
