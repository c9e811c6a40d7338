/* fst_io_direct.c - read a chunk with O_DIRECT into the worker's slot, then scatter it.
 *
 * Tensors sit wherever their file put them, so landing in place would need their
 * alignment to match the device's. The copy is not free: in one comparison (1.7 GB, medians
 * of 7 in random order, very noisy) slots took 1.87 and 1.49 s where reads straight into
 * huge pages, without regard to alignment, took 1.36 to 1.49 and 1.25 to 1.34 s.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <time.h>

#include "fst_internal.h"
#include "fst_sys.h"

#define EAGAIN_TRIES 1000 /* of 1 ms */

static void scatter(const fst_io_context *io, uint64_t slot_begin) {
    for (uint64_t i = io->first; i < io->count; i++) {
        const fst_segment *s = &io->segments[i];
        if (s->file_offset >= io->end) return;
        uint64_t begin = s->file_offset > io->begin ? s->file_offset : io->begin;
        uint64_t end = fst_min(s->file_offset + s->bytes, io->end);
        if (begin >= end) continue;
        memcpy(io->arena->data + s->arena_offset + (begin - s->file_offset),
               io->slot + (begin - slot_begin), (size_t)(end - begin));
    }
}

int fst_io_direct(const fst_io_context *io, fst_error *err) {
    uint64_t from = fst_align_down(io->begin, FST_DIRECT_ALIGN);
    uint64_t want = fst_align_up(io->end - from, FST_DIRECT_ALIGN), need = io->end - from;
    uint64_t got = 0;
    int again = 0;
    if (want > io->slot_bytes)
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: chunk larger than its slot",
                        io->file->path);
    while (got < need) {
        if (atomic_load_explicit(io->stop, memory_order_relaxed))
            return fst_fail(err, FST_E_CANCELLED, ECANCELED, "%s: load cancelled", io->file->path);
        ssize_t n = FST_SYS->pread(io->direct_fd, io->slot + got, (size_t)(want - got),
                                   (off_t)(from + got));
        if (n < 0) {
            int code = errno;
            if (code == EINTR) continue;
            if (code == EAGAIN && again++ < EAGAIN_TRIES) {
                struct timespec pause = {0, 1000000};
                (void)nanosleep(&pause, NULL);
                continue;
            }
            bool refused = code == EINVAL || code == ENOTSUP;
            return fst_fail(err, refused ? FST_E_INVALID : FST_E_SYS, code,
                            "%s: O_DIRECT read at offset %llu: %s", io->file->path,
                            (unsigned long long)(from + got), strerror(code));
        }
        if (n == 0)
            return fst_fail(err, FST_E_TRUNCATED, 0,
                            "%s: the file ends at offset %llu, before the bytes its header "
                            "promises: it was truncated while being read",
                            io->file->path, (unsigned long long)(from + got));
        got += (uint64_t)n;
        if (got >= need) break;
        /* Cut short before the file's end: go on from an aligned place. Cut within the
         * first block there is no progress to be made this way. */
        uint64_t aligned = fst_align_down(got, FST_DIRECT_ALIGN);
        if (aligned == got - (uint64_t)n && again++ > 8)
            return fst_fail(err, FST_E_INVALID, EINVAL,
                            "%s: O_DIRECT reads of under %u bytes at offset %llu", io->file->path,
                            FST_DIRECT_ALIGN, (unsigned long long)(from + got));
        got = aligned;
    }
    scatter(io, from);
    return FST_OK;
}
