/* fst_internal.h - what the engine's own files share and nobody else sees.
 *
 * Ownership and threading are drawn in fst.h. One lock exists, the pool's; it guards
 * the job queue and every job's counters, and is never held across a system call that
 * can block on storage. Arena and file reference counts are atomics, so a tensor's
 * deleter needs no lock.
 */
#ifndef FST_INTERNAL_H
#define FST_INTERNAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>
#include <unistd.h>

#include "fst.h"

#define FST_DIRECT_ALIGN 4096u /* enough for O_DIRECT on every file system met */
#define FST_HUGE_PAGE (2u << 20)

/* Fill *err and return its code. */
__attribute__((format(printf, 4, 5))) int fst_fail(fst_error *err, int code, int sys_errno,
                                                   const char *format, ...);

static inline uint64_t fst_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t fst_align_down(uint64_t n, uint64_t to) { return n - n % to; }
static inline uint64_t fst_align_up(uint64_t n, uint64_t to) {
    return fst_align_down(n + (to - 1), to); /* callers keep n below 2^63 */
}

/* The kernel's page: 4 KiB on x86_64, up to 64 KiB on aarch64. */
static inline uint64_t fst_page(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

/* ---- files ---- */

struct fst_file {
    atomic_uint refs;
    int fd;
    fst_file_info info;
    char path[]; /* for messages only: what was opened is fd */
};

void fst_file_retain(fst_file *file);
/* A second descriptor of the same inode, for O_DIRECT. -1 with errno set. */
int fst_file_open_direct(const fst_file *file);

/* ---- arenas ---- */

enum fst_arena_kind {
    FST_ARENA_MAP,
    FST_ARENA_ANONYMOUS,
    FST_ARENA_BORROWED
};

struct fst_arena {
    atomic_uint users;         /* creator and batches of tensors */
    atomic_uint refs;          /* one for all users together, one for each job */
    atomic_ullong ahead_bytes; /* of a map: read ahead into the page cache for its users */
    atomic_bool small_pages;   /* huge pages were given up for what is not filled yet */
    enum fst_arena_kind kind;
    unsigned char *data;
    uint64_t bytes;
    uint64_t mapped_bytes; /* what munmap takes */
    void *mapped;
};

void fst_arena_retain_user(fst_arena *arena);
void fst_arena_release_user(fst_arena *arena);
void fst_arena_retain(fst_arena *arena); /* a job's hold: keeps the memory, not the purpose */
void fst_arena_unref(fst_arena *arena);
bool fst_arena_abandoned(const fst_arena *arena);
/* Tells how much processor time it took to fill part of an arena: see there. */
void fst_arena_note_fill(fst_arena *arena, uint64_t bytes, uint64_t cpu_nanoseconds);
void fst_arena_count_ahead(fst_arena *arena, uint64_t bytes);

/* ---- counters shown by fst_pool_get_stats ---- */

typedef struct fst_counters {
    atomic_ullong arenas;
    atomic_ullong arena_bytes;
    atomic_ullong files;
    atomic_ullong bytes_ahead; /* read ahead for maps that are still in use */
    atomic_ullong bytes_prefetched;
    atomic_ullong bytes_buffered;
    atomic_ullong bytes_direct;
} fst_counters;

extern fst_counters fst_counts;

/* ---- ways to move one chunk (fst_io_*.c) ---- */

typedef struct fst_io_context { /* what one chunk needs; lives on the worker's stack */
    const fst_file *file;
    int direct_fd;
    fst_arena *arena;
    const fst_segment *segments;
    uint64_t count;
    uint64_t first; /* segment in which the chunk begins */
    uint64_t begin; /* file range [begin, end) of bytes wanted */
    uint64_t end;
    bool drop_cache;
    unsigned char *slot; /* bounce buffer, page aligned, slot_bytes long */
    uint64_t slot_bytes;
    const atomic_bool *stop; /* the job was cancelled: give up between system calls */
} fst_io_context;

int fst_io_buffered(const fst_io_context *io, fst_error *err);
/* FST_E_INVALID with sys_errno: O_DIRECT refused here, nothing was moved. */
int fst_io_direct(const fst_io_context *io, fst_error *err);
/* Returns 0 when the chunk is resident (and, where the kernel can, mapped), ENOBUFS when
 * it needs a slot for that, else why it gave up. */
int fst_io_prefetch(const fst_io_context *io, uint64_t *cold_bytes);
/* The rest of a chunk for which fst_io_prefetch asked for a slot; returns as it does. */
int fst_io_read_through(const fst_io_context *io);

#endif
