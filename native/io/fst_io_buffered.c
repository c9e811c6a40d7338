/* fst_io_buffered.c - read a chunk through the page cache straight into its places. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "base/fst_sys.h"
#include "io/fst_io_buffered.h"
#include "io/fst_io_cache.h"

#define PIECES 512 /* tensors filled by one system call; the kernel takes 1024 */

/* The destinations of the file range [at, io->end) that follow each other without a
 * gap, at most PIECES; *segment is where at lies. Returns how many. */
static int gather(const fst_io_context *io, uint64_t segment, uint64_t at, struct iovec *to) {
    const fst_segment *begins = &io->segments[io->first];
    uint64_t origin = begins->arena_offset + (io->begin - begins->file_offset);
    int count = 0;
    if (io->into != NULL) { /* gaps and all */
        *to = (struct iovec){io->into + (at - io->begin), (size_t)(io->end - at)};
        return 1;
    }
    while (count < PIECES && segment < io->count && at < io->end) {
        const fst_segment *s = &io->segments[segment];
        if (s->bytes == 0) {
            segment++;
            continue;
        }
        if (s->file_offset > at) break; /* a gap */
        uint64_t skip = at - s->file_offset;
        uint64_t bytes = fst_min(s->bytes - skip, io->end - at);
        uint64_t place = s->arena_offset + skip;
        to[count].iov_base = io->packed ? io->slot + (place - origin) : io->arena->data + place;
        to[count++].iov_len = (size_t)bytes;
        at += bytes;
        if (skip + bytes < s->bytes) break;
        segment++;
    }
    return count;
}

static uint64_t skip_to(const fst_io_context *io, uint64_t segment, uint64_t *at) {
    while (segment < io->count) {
        const fst_segment *s = &io->segments[segment];
        if (s->bytes > 0 && *at < s->file_offset + s->bytes) {
            if (*at < s->file_offset) *at = s->file_offset;
            break;
        }
        segment++;
    }
    return segment;
}

/* Whole huge pages: the kernel keeps a page that the range covers only in part. */
static void drop_chunk(const fst_io_context *io) {
    uint64_t first = fst_align_down(io->begin, FST_HUGE_PAGE);
    uint64_t bytes = fst_align_up(io->end, FST_HUGE_PAGE) - first;
    (void)FST_SYS->fadvise(io->file->fd, (off_t)first, (off_t)bytes, POSIX_FADV_DONTNEED);
}

int fst_io_buffered(const fst_io_context *io, fst_error *err) {
    struct iovec to[PIECES];
    uint64_t at = io->begin, segment = io->first;
    int again = 0;
    fst_io_fill_cache(io);
    for (;;) {
        segment = skip_to(io, segment, &at);
        if (segment == io->count || at >= io->end) break;
        if (fst_io_check_stop(io, err) != FST_OK) return err->code;
        int pieces = gather(io, segment, at, to);
        ssize_t got = FST_SYS->preadv(io->file->fd, to, pieces, (off_t)at);
        if (got < 0) {
            if (fst_io_again(errno, &again)) continue;
            return fst_fail(err, FST_E_SYS, errno, "%s: reading at offset %llu: %s", io->file->path,
                            (unsigned long long)at, strerror(errno));
        }
        if (got == 0) return fst_file_truncated(io->file, at, err);
        at += (uint64_t)got;
        again = 0;
    }
    if (io->drop_cache) drop_chunk(io);
    return FST_OK;
}
