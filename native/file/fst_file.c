/* fst_file.c - open files: identity, exact reads, residency. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "base/fst_sys.h"
#include "file/fst_file.h"

#define DROP_TRIES 15  /* 30 ms; reads of some MiB take a few */
#define DROP_BLINDLY 5 /* where no probe can see what is left */

/* FST_E_NOMEM. */
static int no_memory(const char *path, fst_error *err) {
    return fst_fail(err, FST_E_NOMEM, ENOMEM, "%s: no memory to open it", path);
}

/* NULL where there is no memory. */
static fst_file *blank_file(const char *path, int fd) {
    size_t length = strlen(path) + 1;
    fst_file *file = calloc(1, sizeof *file + length);
    if (file == NULL) return NULL;
    atomic_init(&file->refs, 1);
    atomic_init(&file->hint_fd, -1);
    atomic_init(&file->window, -1);
    file->fd = file->info.fd = fd;
    memcpy(file->path, path, length);
    return file;
}

static int new_file(const char *path, int fd, const struct stat *status, fst_file **out,
                    fst_error *err) {
    struct statfs filesystem;
    fst_file *file = blank_file(path, fd);
    if (file == NULL) return no_memory(path, err);
    file->info.size = (uint64_t)status->st_size;
    file->info.dev = (uint64_t)status->st_dev;
    file->info.ino = (uint64_t)status->st_ino;
    file->info.fs_magic = fstatfs(fd, &filesystem) == 0 ? (uint64_t)filesystem.f_type : 0;
    atomic_fetch_add(&fst_counts.files, 1);
    *out = file;
    return FST_OK;
}

int fst_file_open(const char *path, fst_file **out, fst_file_info *info, fst_error *err) {
    struct stat status, named;
    int code;
    *out = NULL;
    /* Opening and closing a pipe would release a writer that waits for its reader, and then break
     * the pipe. So anything but a regular file is left to stock, which opens it once. */
    if (FST_SYS->stat(path, &named) != 0) return fst_fail_call(err, path, "stat", errno);
    if (!S_ISREG(named.st_mode))
        return fst_fail(err, FST_FALLBACK, 0, "%s: not a regular file", path);
    /* O_NONBLOCK: if it is a pipe by now, opening it does not wait; regular files ignore it. */
    int fd = FST_SYS->open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return fst_fail_call(err, path, "open", errno);
    if (FST_SYS->fstat(fd, &status) != 0)
        code = fst_fail_call(err, path, "fstat", errno);
    else if (!S_ISREG(status.st_mode) || status.st_size < 0)
        code = fst_fail(err, FST_FALLBACK, 0, "%s: not a regular file", path);
    else if (status.st_dev != named.st_dev || status.st_ino != named.st_ino)
        code = fst_fail(err, FST_FALLBACK, 0, "%s: replaced while it was opened", path);
    else
        code = new_file(path, fd, &status, out, err);
    if (code == FST_OK)
        *info = (*out)->info;
    else
        close(fd);
    return code;
}

int fst_file_feed(const char *name, uint64_t size, int32_t most, fst_feed feed, void *context,
                  fst_file **out, fst_file_info *info, fst_error *err) {
    *out = NULL;
    if (feed == NULL || size > INT64_MAX || most < 1 || most > FST_MOST_CALLS)
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: a fed file's arguments are out of range",
                        name);
    fst_file *file = blank_file(name, -1);
    if (file != NULL) file->fed = calloc(1, sizeof *file->fed);
    if (file == NULL || file->fed == NULL) {
        free(file);
        return no_memory(name, err);
    }
    file->fed->feed = feed;
    file->fed->context = context;
    file->fed->most = most;
    file->info.size = size;
    atomic_fetch_add(&fst_counts.fed_files, 1);
    *info = file->info;
    *out = file;
    return FST_OK;
}

int fst_file_refuse_fed(const fst_file *file, const char *what, fst_error *err) {
    if (file == NULL || file->fed == NULL) return FST_OK;
    return fst_fail(err, FST_E_INVALID, EINVAL,
                    "%s: it is not a local file, so there is no %s: it can only be read",
                    file->path, what);
}

uint64_t fst_open_files(void) { return atomic_load(&fst_counts.files); }

int64_t fst_path_bytes(const char *path) {
    struct stat found;
    return FST_SYS->stat(path, &found) == 0 && S_ISREG(found.st_mode) ? (int64_t)found.st_size : -1;
}

const char *fst_source_name(const fst_file *file) {
    return file == NULL ? "host memory" : file->path;
}

int fst_file_truncated(const fst_file *file, uint64_t offset, fst_error *err) {
    return fst_fail(
        err, FST_E_TRUNCATED, 0,
        "%s: the file ends at offset %llu, before the bytes its header promises: it was "
        "truncated while being read",
        file->path, (unsigned long long)offset);
}

int fst_file_check_end(const fst_file *file, uint64_t end, fst_error *err) {
    struct stat now;
    if (FST_SYS->fstat(file->fd, &now) != 0)
        return fst_fail(err, FST_E_SYS, errno, "%s: its size after reading up to offset %llu: %s",
                        file->path, (unsigned long long)end, strerror(errno));
    if ((uint64_t)now.st_size >= end) return FST_OK;
    return fst_file_truncated(file, (uint64_t)now.st_size, err);
}

void fst_file_retain(fst_file *file) {
    atomic_fetch_add_explicit(&file->refs, 1, memory_order_relaxed);
}

void fst_file_unref(fst_file *file) {
    if (file == NULL) return;
    if (atomic_fetch_sub_explicit(&file->refs, 1, memory_order_acq_rel) != 1) return;
    if (file->fed == NULL) {
        close(file->fd);
        if (atomic_load(&file->hint_fd) >= 0) close(atomic_load(&file->hint_fd));
        atomic_fetch_sub(&fst_counts.files, 1);
    } else {
        atomic_fetch_sub(&fst_counts.fed_files, 1);
    }
    free(file->fed);
    free(file);
}

void fst_file_read_exactly(fst_file *file) {
    if (file->fed != NULL) return; /* it never reads more */
    (void)FST_SYS->fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM);
    atomic_store(&file->exactly, true);
}

void fst_file_release(fst_file **file) {
    fst_file *held = *file;
    *file = NULL;
    fst_file_unref(held);
}

/* Another descriptor of the same inode. -1 with errno set. */
static int open_again(const fst_file *file, int flags) {
    char link[64];
    flags |= O_RDONLY | O_CLOEXEC | O_NONBLOCK;
    /* Through /proc: the same inode whatever the path names by now. */
    (void)snprintf(link, sizeof link, "/proc/self/fd/%d", file->fd);
    int fd = FST_SYS->open(link, flags);
    if (fd >= 0) return fd;
    int code = errno;
    if (code != ENOENT && code != EACCES) return -1;
    fd = FST_SYS->open(file->path, flags); /* no /proc here */
    if (fd < 0) return -1;
    struct stat status;
    if (FST_SYS->fstat(fd, &status) == 0 && (uint64_t)status.st_dev == file->info.dev &&
        (uint64_t)status.st_ino == file->info.ino)
        return fd;
    close(fd);
    errno = ESTALE;
    return -1;
}

int fst_file_open_direct(const fst_file *file) { return open_again(file, O_DIRECT); }
int fst_file_open_again(const fst_file *file) { return open_again(file, 0); }

uint64_t fst_file_window(fst_file *file) {
    /* A disk, a partition of one, and a file system with a setting of its own. */
    static const struct {
        const char *folder, *name;
    } places[] = {{"/sys/dev/block", "queue/read_ahead_kb"},
                  {"/sys/dev/block", "../queue/read_ahead_kb"},
                  {"/sys/class/bdi", "read_ahead_kb"}};
    long long window = atomic_load(&file->window);
    struct stat status;
    if (window >= 0) return (uint64_t)window;
    window = 0;
    if (FST_SYS->fstat(file->fd, &status) == 0)
        for (size_t i = 0; window <= 0 && i < sizeof places / sizeof *places; i++)
            if (!fst_read_number(&window, "%s/%u:%u/%s", places[i].folder, major(status.st_dev),
                                 minor(status.st_dev), places[i].name))
                window = -1;
    if (window < 0 || window > (1 << 20)) window = 0;
    atomic_store(&file->window, window << 10);
    return (uint64_t)window << 10;
}

int fst_file_read(fst_file *file, uint64_t offset, void *to, uint64_t length, fst_error *err) {
    unsigned char *at = to;
    if (offset > INT64_MAX || length > INT64_MAX - offset)
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: offset %llu out of range", file->path,
                        (unsigned long long)offset);
    if (file->fed != NULL) {
        if (offset > file->info.size || length > file->info.size - offset)
            return fst_file_truncated(file, file->info.size, err);
        return fst_feed_fill(file->fed, file->path, offset, length, to, err);
    }
    while (length > 0) {
        ssize_t got = FST_SYS->pread(file->fd, at, (size_t)length, (off_t)offset);
        if (got < 0) {
            if (errno == EINTR) continue;
            return fst_fail(err, FST_E_SYS, errno, "%s: reading %llu bytes at offset %llu: %s",
                            file->path, (unsigned long long)length, (unsigned long long)offset,
                            strerror(errno));
        }
        if (got == 0)
            return fst_fail(err, FST_E_TRUNCATED, 0,
                            "%s: the file ends at offset %llu, %llu bytes early", file->path,
                            (unsigned long long)offset, (unsigned long long)length);
        at += got;
        offset += (uint64_t)got;
        length -= (uint64_t)got;
    }
    return FST_OK;
}

/* ---- residency ---- */

/* mincore is right only on files that the caller owns or may write; for others it reports
 * everything as resident. */
static bool mincore_is_honest(int fd) {
    struct stat status;
    char link[64];
    if (FST_SYS->fstat(fd, &status) != 0) return false;
    if (status.st_uid == geteuid()) return true;
    (void)snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return access(link, W_OK) == 0;
}

static bool probe_mincore(int fd, uint64_t offset, uint64_t length, uint64_t *resident) {
    enum {
        BATCH = 4096
    }; /* pages at a time */
    unsigned char flags[BATCH];
    uint64_t begin = fst_align_down(offset, fst_page()), pages = 0, total = 0;
    if (!mincore_is_honest(fd)) return false;
    for (uint64_t at = begin; at < offset + length; at += BATCH * fst_page()) {
        size_t bytes = (size_t)fst_min(offset + length - at, BATCH * fst_page());
        void *map = FST_SYS->mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, (off_t)at);
        if (map == MAP_FAILED) return false;
        int failed = FST_SYS->mincore(map, bytes, flags);
        (void)munmap(map, bytes);
        if (failed != 0) return false;
        size_t count = (bytes + (size_t)fst_page() - 1) / (size_t)fst_page();
        for (size_t i = 0; i < count; i++) pages += flags[i] & 1u;
        total += count;
    }
    *resident = total == 0 ? 0 : (uint64_t)((double)length * (double)pages / (double)total);
    return true;
}

int fst_file_residency(fst_file *file, uint64_t offset, uint64_t length, uint64_t *resident,
                       int *probe) {
    *resident = 0;
    *probe = FST_PROBE_NONE;
    if (file->fed != NULL) return FST_E_INVALID;
    if (offset >= file->info.size) return FST_OK;
    length = fst_min(length, file->info.size - offset);
    if (length == 0) return FST_OK;
    long long pages = FST_SYS->cachestat(file->fd, offset, length);
    if (pages >= 0) {
        *probe = FST_PROBE_CACHESTAT;
        uint64_t bytes = (uint64_t)pages * fst_page();
        *resident = fst_min(bytes, length);
        return FST_OK;
    }
    if (probe_mincore(file->fd, offset, length, resident))
        *probe = FST_PROBE_MINCORE;
    else
        *resident = 0;
    return FST_OK;
}

/* Uses a descriptor of its own, because read-ahead is set per descriptor: with it off, a miss reads
 * one page. */
bool fst_file_has_page(fst_file *file, uint64_t offset) {
    unsigned char byte;
    struct iovec to = {&byte, 1};
    int none = -1, fd = atomic_load(&file->hint_fd);
    if (fd < 0) {
        int made = open_again(file, 0);
        if (made < 0) return false;
        (void)FST_SYS->fadvise(made, 0, 0, POSIX_FADV_RANDOM);
        if (atomic_compare_exchange_strong(&file->hint_fd, &none, made)) {
            fd = made;
        } else {
            close(made);
            fd = none; /* another thread's */
        }
    }
    return FST_SYS->preadv2(fd, &to, 1, (off_t)offset, RWF_NOWAIT) == 1;
}

/* The kernel's read-ahead may still be under way, and its pages can be dropped only when they have
 * arrived. Pages that remain after DROP_TRIES are in use by another process. */
void fst_file_drop_cache(fst_file *file) {
    int tries = DROP_TRIES;
    for (int i = 0; i < tries; i++) {
        uint64_t resident;
        int probe;
        struct timespec pause = {0, 2000000};
        if (FST_SYS->fadvise(file->fd, 0, 0, POSIX_FADV_DONTNEED) != 0) return; /* not here */
        (void)fst_file_residency(file, 0, file->info.size, &resident, &probe);
        if (probe == FST_PROBE_NONE)
            tries = DROP_BLINDLY;
        else if (resident == 0)
            return;
        (void)nanosleep(&pause, NULL);
    }
}
