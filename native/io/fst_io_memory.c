/* fst_io_memory.c - copy a chunk's pieces from host memory into its slot.
 *
 * The memory belongs to the caller. If it is a map of a file that is not cached, the copy would
 * fault it in by small reads, one after another. So the missing part of a chunk is requested at
 * once (docs/design-notes.md, "Uploads of a cold map"). The flags of the map, huge pages among
 * them, are its owner's and stay as they are.
 */
#include <string.h>
#include <sys/mman.h>

#include "base/fst_sys.h"
#include "io/fst_io_memory.h"

#define STRIDE (512u << 10) /* one call reads no more than the device takes in one request */
#define SMALLEST_PAGE 4096u
#define WORTH_ASKING (64u << 10) /* less comes with one fault */

/* Requests whole pages. It is advice only: the copy faults in the rest. For files that this process
 * does not own, mincore reports every page as there, and nothing is requested. */
static void ask_for(uint64_t first, uint64_t end) {
    unsigned char there[STRIDE / SMALLEST_PAGE];
    uint64_t page = fst_page();
    if (end - first < WORTH_ASKING) return;
    for (uint64_t at = first; at < end; at += STRIDE) {
        void *address = (void *)(uintptr_t)at;
        size_t bytes = (size_t)fst_min(STRIDE, end - at), pages = bytes / page, i = 0;
        if (FST_SYS->mincore(address, bytes, there) != 0) return;
        while (i < pages && (there[i] & 1) != 0) i++;
        if (i < pages) (void)FST_SYS->madvise(address, bytes, MADV_WILLNEED);
    }
}

/* Requests the pages that pieces lie in. Pages beside them may not even be mapped. */
static void ask_for_all(const fst_io_context *io) {
    fst_pieces pieces = {.io = io};
    fst_piece piece;
    uint64_t first = 0, end = 0, page = fst_page();
    while (fst_pieces_next(&pieces, &piece)) {
        uint64_t from = fst_align_down(piece.source, page);
        if (from > end) {
            ask_for(first, end);
            first = from;
        }
        end = fst_align_up(piece.source + piece.bytes, page);
    }
    ask_for(first, end);
}

int fst_io_memory(const fst_io_context *io, fst_error *err) {
    fst_pieces pieces = {.io = io};
    fst_piece piece;
    ask_for_all(io);
    fst_pieces_clear_padding(io);
    while (fst_pieces_next(&pieces, &piece)) {
        if (fst_io_check_stop(io, err) != FST_OK) return err->code;
        memcpy(io->slot + piece.in_slot, (const void *)(uintptr_t)piece.source,
               (size_t)piece.bytes);
    }
    return FST_OK;
}
