/* fst_io_direct.c - read a chunk with O_DIRECT into the worker's slot, and copy it to its places.
 *
 * Tensors lie at any offset of their file, and devices read blocks at block boundaries. So every
 * byte is copied once. Slots are small, few and reused: 1.7 GB took 0.68 s through 16 slots of
 * 1 MiB, and 0.86 s when each block was read beside its place and moved there. docs/design-notes.md
 * has the other ways that were tried.
 */
#include <errno.h>
#include <string.h>

#include "base/fst_sys.h"
#include "io/fst_io_direct.h"

/* Whether the next read may be made. */
static int check(const fst_io_context *io, fst_error *err) {
    if (fst_io_check_stop(io, err) != FST_OK) return err->code;
    uint64_t from = fst_align_down(io->begin, FST_DIRECT_ALIGN);
    if (fst_align_up(io->end - from, FST_DIRECT_ALIGN) > io->slot_bytes)
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: chunk larger than its slot",
                        io->file->path);
    return FST_OK;
}

int fst_io_direct_slot(const fst_io_context *io, fst_error *err) {
    uint64_t from = fst_align_down(io->begin, FST_DIRECT_ALIGN);
    uint64_t want = fst_align_up(io->end - from, FST_DIRECT_ALIGN), need = io->end - from;
    uint64_t got = 0;
    int again = 0;
    while (got < need) {
        int code = check(io, err);
        if (code != FST_OK) return code;
        ssize_t n = FST_SYS->pread(io->direct_fd, io->slot + got, (size_t)(want - got),
                                   (off_t)(from + got));
        if (n < 0) {
            code = errno;
            if (fst_io_again(code, &again)) continue;
            /* EFAULT: the slot is a driver's, and the kernel cannot pin it for the read. */
            bool refused = code == EINVAL || code == ENOTSUP || code == EFAULT;
            return fst_fail(err, refused ? FST_E_INVALID : FST_E_SYS, code,
                            "%s: O_DIRECT read at offset %llu: %s", io->file->path,
                            (unsigned long long)(from + got), strerror(code));
        }
        if (n == 0) return fst_file_truncated(io->file, from + got, err);
        got += (uint64_t)n;
        if (got >= need) break;
        /* Cut short before the file's end: go on from an aligned place. A read cut within its first
         * block makes no progress this way. */
        uint64_t aligned = fst_align_down(got, FST_DIRECT_ALIGN);
        if (aligned == got - (uint64_t)n && again++ > 8)
            return fst_fail(err, FST_E_INVALID, EINVAL,
                            "%s: O_DIRECT reads of under %u bytes at offset %llu", io->file->path,
                            FST_DIRECT_ALIGN, (unsigned long long)(from + got));
        got = aligned;
    }
    return fst_file_check_end(io->file, io->end, err);
}

int fst_io_direct(const fst_io_context *io, fst_error *err) {
    int code = fst_io_direct_slot(io, err);
    if (code == FST_OK) fst_pieces_scatter(io);
    return code;
}
