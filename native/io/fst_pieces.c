/* fst_pieces.c - which pieces a chunk consists of, and where they lie in its slot.
 *
 *   as in the file    for reads in whole blocks, gaps included: O_DIRECT and cuFile
 *   as in the arena   for moves piece by piece (packed): neighbours in the arena are
 *                     neighbours in the slot, with the padding between them, so that one
 *                     copy brings them all. A driver's call takes 1 to 3 us; packing, in
 *                     buffered reads of 18,867 tensors of 200 bytes, took 10 ns a tensor
 *
 * Padding is the space that an arena's planner leaves between tensors, less than PADDING bytes. It
 * is copied as zeros, which overwrite nothing, except in a borrowed arena: that may cover memory of
 * several owners, with other data between them.
 */
#include <string.h>

#include "io/fst_pieces.h"

#define PADDING 256u

uint64_t fst_pack(const fst_packing *last, const fst_arena *arena, uint64_t at, bool *joins) {
    uint64_t gap = at - last->in_arena; /* huge where it lies before */
    *joins = last->in_slot > 0 && gap < (arena->kind == FST_ARENA_BORROWED ? 1 : PADDING);
    return *joins ? last->in_slot + gap : fst_align_up(last->in_slot, PADDING);
}

void fst_pieces_clear_padding(const fst_io_context *io) {
    fst_pieces pieces = {.io = io};
    fst_piece piece;
    uint64_t end = 0;
    while (fst_pieces_next(&pieces, &piece)) {
        if (piece.joins) memset(io->slot + end, 0, (size_t)(piece.in_slot - end));
        end = piece.in_slot + piece.bytes;
    }
}

void fst_pieces_scatter(const fst_io_context *io) {
    fst_pieces pieces = {.io = io};
    fst_piece piece;
    while (fst_pieces_next(&pieces, &piece))
        memcpy(io->arena->data + piece.at, io->slot + piece.in_slot, (size_t)piece.bytes);
}

bool fst_pieces_next(fst_pieces *pieces, fst_piece *piece) {
    const fst_io_context *io = pieces->io;
    fst_packing *last = &pieces->packing;
    for (uint64_t i; (i = io->first + pieces->passed) < io->count;) {
        const fst_segment *s = &io->segments[i];
        if (s->file_offset >= io->end) return false;
        pieces->passed++;
        uint64_t begin = s->file_offset > io->begin ? s->file_offset : io->begin;
        uint64_t end = fst_min(s->file_offset + s->bytes, io->end);
        if (begin >= end) continue;
        piece->source = begin;
        piece->bytes = end - begin;
        piece->at = s->arena_offset + (begin - s->file_offset);
        if (io->packed) {
            piece->in_slot = fst_pack(last, io->arena, piece->at, &piece->joins);
        } else {
            piece->in_slot = begin - fst_align_down(io->begin, FST_DIRECT_ALIGN);
            piece->joins =
                last->in_slot > 0 && piece->in_slot == last->in_slot && piece->at == last->in_arena;
        }
        *last = (fst_packing){piece->at + piece->bytes, piece->in_slot + piece->bytes};
        return true;
    }
    return false;
}
