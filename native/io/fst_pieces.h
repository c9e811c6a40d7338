/* fst_pieces.h - one chunk, as the files that move its bytes see it (fst_io_*.c, fst_gds.c,
 * fst_transfer.c), and the pieces of segments in it.
 */
#pragma once

#include <errno.h>

#include "file/fst_file.h"
#include "tensor/fst_arena.h"

typedef struct fst_io_context { /* what one chunk needs; lives on the worker's stack */
    fst_file *file;             /* NULL: an upload, whose file offsets are addresses */
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

/* FST_E_CANCELLED once the job is to stop. */
static inline int fst_io_check_stop(const fst_io_context *io, fst_error *err) {
    if (!atomic_load_explicit(io->stop, memory_order_relaxed)) return FST_OK;
    return fst_fail(err, FST_E_CANCELLED, ECANCELED, "%s: load cancelled",
                    fst_source_name(io->file));
}

/* Whether a read that failed with this errno is to be repeated; waits before EAGAIN is. */
static inline bool fst_io_again(int code, int *tries) {
    const struct timespec pause = {0, 1000000};
    if (code == EINTR) return true;
    if (code != EAGAIN || (*tries)++ >= 1000) return false;
    (void)nanosleep(&pause, NULL);
    return true;
}

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
/* Copies every piece from the slot, where it lies as in the file, to its place in the arena. */
void fst_pieces_scatter(const fst_io_context *io);
/* Zeros for the padding between pieces of a packed slot. */
void fst_pieces_clear_padding(const fst_io_context *io);
/* Where in a packed slot the next piece goes, and whether it joins the last. */
uint64_t fst_pack(const fst_packing *last, const fst_arena *arena, uint64_t at, bool *joins);
