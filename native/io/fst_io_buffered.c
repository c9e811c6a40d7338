/* fst_io_buffered.c - read a chunk through the page cache straight into its places. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "base/fst_sys.h"
#include "io/fst_io_buffered.h"
#include "io/fst_io_cache.h"

#define PIECES 512 /* tensors filled by one system call; the kernel takes 1024 */

/* Fills `count` destinations that follow each other in the file, from offset `at` on. */
static int read_run(const fst_io_context *io, uint64_t at, struct iovec *to, int count,
                    fst_error *err) {
    int again = 0;
    while (count > 0) {
        if (fst_io_check_stop(io, err) != FST_OK) return err->code;
        ssize_t got = FST_SYS->preadv(io->file->fd, to, count, (off_t)at);
        if (got < 0) {
            if (fst_io_again(errno, &again)) continue;
            return fst_fail(err, FST_E_SYS, errno, "%s: reading at offset %llu: %s", io->file->path,
                            (unsigned long long)at, strerror(errno));
        }
        if (got == 0) return fst_file_truncated(io->file, at, err);
        at += (uint64_t)got;
        again = 0;
        size_t left = (size_t)got;
        for (; count > 0 && left >= to->iov_len; to++, count--) left -= to->iov_len;
        if (count == 0) break;
        to->iov_base = (unsigned char *)to->iov_base + left;
        to->iov_len -= left;
    }
    return FST_OK;
}

/* Reads every piece of the chunk to its place; pieces without a gap between them in one call. */
static int read_pieces(const fst_io_context *io, fst_error *err) {
    struct iovec to[PIECES];
    fst_pieces pieces = {.io = io};
    fst_piece piece;
    uint64_t begin = io->begin, end = begin;
    int count = 0, code = FST_OK;
    while (code == FST_OK && fst_pieces_next(&pieces, &piece)) {
        if (piece.source != end || count == PIECES) {
            code = read_run(io, begin, to, count, err);
            begin = piece.source;
            count = 0;
        }
        unsigned char *place = io->packed ? io->slot + piece.in_slot : io->arena->data + piece.at;
        to[count++] = (struct iovec){place, (size_t)piece.bytes};
        end = piece.source + piece.bytes;
    }
    return code == FST_OK ? read_run(io, begin, to, count, err) : code;
}

/* Whole huge pages: the kernel keeps a page that the range covers only in part. */
static void drop_chunk(const fst_io_context *io) {
    uint64_t first = fst_align_down(io->begin, FST_HUGE_PAGE);
    uint64_t bytes = fst_align_up(io->end, FST_HUGE_PAGE) - first;
    (void)FST_SYS->fadvise(io->file->fd, (off_t)first, (off_t)bytes, POSIX_FADV_DONTNEED);
}

int fst_io_buffered(const fst_io_context *io, fst_error *err) {
    struct iovec whole = {io->into, (size_t)(io->end - io->begin)};
    fst_io_fill_cache(io);
    int code = io->into != NULL ? read_run(io, io->begin, &whole, 1, err) : read_pieces(io, err);
    if (code == FST_OK) code = fst_file_check_end(io->file, io->end, err);
    if (code == FST_OK && io->drop_cache) drop_chunk(io);
    return code;
}
