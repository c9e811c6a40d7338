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

/* ---- memory ---- */

typedef struct fst_pages {
    unsigned char *data;
    uint64_t bytes;
    void *map; /* what munmap takes; data lies aligned in it */
    uint64_t map_bytes;
} fst_pages;

/* Zeroed memory, 2 MiB aligned and in huge pages where it is as large as one and the system
 * allows them. Returns 0 or an errno. */
int fst_pages_map(fst_pages *pages, uint64_t bytes);
void fst_pages_unmap(fst_pages *pages); /* and empties it; nothing to do for an empty one */

/* ---- files ---- */

struct fst_file {
    atomic_uint refs;
    atomic_bool exactly; /* see fst_file_read_exactly */
    atomic_int hint_fd;  /* of the same inode, for fst_file_has_page; -1 until it is needed */
    atomic_llong window; /* see fst_file_window; -1 until it is needed */
    int fd;
    fst_file_info info;
    char path[]; /* for messages only: what was opened is fd */
};

void fst_file_retain(fst_file *file);
/* What messages call the source of a job: the file's path, or host memory. */
const char *fst_source_name(const fst_file *file);
/* A second descriptor of the same inode, for O_DIRECT. -1 with errno set. */
int fst_file_open_direct(const fst_file *file);
/* A second open file description of the same inode, with read-ahead of its own. -1 with errno. */
int fst_file_open_again(const fst_file *file);
/* How many bytes the kernel reads ahead of a fault, by its setting for the device; 0: unknown. */
uint64_t fst_file_window(fst_file *file);
/* Whether the page at an offset is cached and up to date: a hint, where no probe tells. Where it
 * is not, that page alone is read. */
bool fst_file_has_page(fst_file *file, uint64_t offset);
/* Leaves nothing of it in the page cache, if nobody else uses it. Takes milliseconds. */
void fst_file_drop_cache(fst_file *file);

/* ---- arenas ---- */

enum fst_arena_kind {
    FST_ARENA_MAP,
    FST_ARENA_ANONYMOUS,
    FST_ARENA_BORROWED,
    FST_ARENA_ADOPTED
};

struct fst_arena {
    atomic_uint users;         /* creator and batches of tensors */
    atomic_uint refs;          /* one for all users together, one for each job */
    atomic_ullong ahead_bytes; /* of a map: read ahead into the page cache for its users */
    atomic_ullong fill_bytes;  /* since the last judgement of fst_arena_note_fill */
    atomic_ullong fill_nanoseconds;
    atomic_bool small_pages; /* huge pages were given up for what is not filled yet */
    atomic_bool kept;        /* faults of the map read nothing ahead, somewhere */
    enum fst_arena_kind kind;
    unsigned char *data;
    uint64_t bytes;
    fst_pages pages;     /* what is to be unmapped; of borrowed memory, nothing */
    int32_t device_type; /* DLPack's; the CPU's for all but adopted memory */
    int32_t device_id;
    void *managed; /* of adopted memory: the DLManagedTensor */
};

void fst_arena_retain_user(fst_arena *arena);
void fst_arena_release_user(fst_arena *arena);
void fst_arena_retain(fst_arena *arena); /* a job's hold: keeps the memory, not the purpose */
void fst_arena_unref(fst_arena *arena);
bool fst_arena_abandoned(const fst_arena *arena);
/* Tells how much processor time it took to fill part of an arena: see there. */
void fst_arena_note_fill(fst_arena *arena, uint64_t bytes, uint64_t cpu_nanoseconds);
void fst_arena_count_ahead(fst_arena *arena, uint64_t bytes);
/* Undoes fst_arena_keep_to, where it was called: nothing more will be read ahead. */
void fst_arena_keep_no_more(fst_arena *map);

/* ---- counters shown by fst_pool_get_stats ---- */

typedef struct fst_counters {
    atomic_ullong arenas;
    atomic_ullong arena_bytes;
    atomic_ullong files;
    atomic_ullong bytes_ahead; /* read ahead for maps that are still in use */
    atomic_ullong bytes_prefetched;
    atomic_ullong bytes_buffered;
    atomic_ullong bytes_direct;
    atomic_ullong bytes_copied; /* to devices */
    atomic_ullong bytes_uploaded;
} fst_counters;

extern fst_counters fst_counts;

/* ---- ways to move one chunk (fst_io_*.c) ---- */

typedef struct fst_io_context { /* what one chunk needs; lives on the worker's stack */
    const fst_file *file;       /* NULL: an upload, whose file offsets are addresses */
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
    bool packed;             /* the slot holds the pieces as the arena will: see fst_pieces.c */
    unsigned char *into;     /* buffered: where begin goes, and the rest behind it as in the file;
                                NULL: every piece to its place in the arena, or to that of its
                                packed slot, which is one run then */
    const atomic_bool *stop; /* the job was cancelled: give up between system calls */
} fst_io_context;

/* ---- the pieces of a chunk (fst_pieces.c) ---- */

typedef struct fst_piece { /* of one segment, within the chunk */
    uint64_t source;       /* file offset or address */
    uint64_t bytes;        /* never 0 */
    uint64_t at;           /* arena offset */
    uint64_t in_slot;      /* where in the slot its bytes are */
    bool joins;            /* one copy brings it with the piece before, and what is between */
} fst_piece;

typedef struct fst_packing { /* where the last piece ends */
    uint64_t in_arena;
    uint64_t in_slot; /* 0: there is none */
} fst_packing;

typedef struct fst_pieces { /* {.io = io} before the first */
    const fst_io_context *io;
    uint64_t passed; /* segments, from the chunk's first */
    fst_packing packing;
} fst_pieces;

bool fst_pieces_next(fst_pieces *pieces, fst_piece *piece);
/* Zeros for the padding between pieces of a packed slot. */
void fst_pieces_clear_padding(const fst_io_context *io);
/* Where in a packed slot the next piece goes, and whether it joins the last. */
uint64_t fst_pack(const fst_packing *last, const fst_arena *arena, uint64_t at, bool *joins);

/* An upload's pieces into the slot. */
int fst_io_memory(const fst_io_context *io, fst_error *err);
int fst_io_buffered(const fst_io_context *io, fst_error *err);
/* FST_E_INVALID with sys_errno: O_DIRECT refused here, nothing was moved. */
int fst_io_direct(const fst_io_context *io, fst_error *err);
/* The reading of it only: the file's bytes from fst_align_down(begin, FST_DIRECT_ALIGN) on lie
 * in the slot then. */
int fst_io_direct_slot(const fst_io_context *io, fst_error *err);
/* Returns 0 when the chunk is resident (and, where the kernel can, mapped), ENOBUFS when
 * it needs a slot for that, else why it gave up. */
int fst_io_prefetch(const fst_io_context *io, uint64_t *cold_bytes);
/* What of the chunk is not cached is read into the page cache, many pages at a time. */
void fst_io_fill_cache(const fst_io_context *io);
/* The rest of a chunk for which fst_io_prefetch asked for a slot; returns as it does. */
int fst_io_read_through(const fst_io_context *io);

#endif
