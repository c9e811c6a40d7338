/* fst_io_direct.c - read a chunk with O_DIRECT, in place or through the worker's slot.
 *
 * Tensors sit wherever their file put them, and devices want blocks at block boundaries. So a
 * chunk is read beside its place, less than a block away, and moved there; or, where that
 * cannot be, into the slot, and copied. load_file of 1.7 GB, 2 busy cores, medians of 15 in
 * random order: 1.35 s through slots, 1.18 s in place, 1.04 s for reads that keep nothing.
 * Tried in vain, with memory that is there: a thread that faults pages in ahead of the reads
 * (0.77 s against 0.68, medians of 8), 16 workers of 4 MiB (0.74 against 0.72, medians of 7).
 * 16 workers of 2 MiB loaded in 0.66 s against 0.72 in that run; on another machine, against 8 of
 * 4 MiB, in 0.865 s against 0.916 (medians of 12), 0.881 against 0.929 and 0.888 against 0.888
 * (medians of 6): they are the default.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "fst_internal.h"
#include "fst_sys.h"

#define EAGAIN_TRIES 1000       /* of 1 ms */
#define IN_PLACE_MIN (1u << 20) /* not measured for less */

/* Copies the wanted bytes of the file range [low, high) from the slot to their places. */
static void scatter(const fst_io_context *io, uint64_t low, uint64_t high) {
    uint64_t slot_begin = fst_align_down(io->begin, FST_DIRECT_ALIGN);
    for (uint64_t i = io->first; i < io->count; i++) {
        const fst_segment *s = &io->segments[i];
        if (s->file_offset >= high) return;
        uint64_t begin = s->file_offset > low ? s->file_offset : low;
        uint64_t end = fst_min(s->file_offset + s->bytes, high);
        if (begin >= end) continue;
        memcpy(io->arena->data + s->arena_offset + (begin - s->file_offset),
               io->slot + (begin - slot_begin), (size_t)(end - begin));
    }
}

/* Whether to go on. */
static int check(const fst_io_context *io, fst_error *err) {
    if (atomic_load_explicit(io->stop, memory_order_relaxed))
        return fst_fail(err, FST_E_CANCELLED, ECANCELED, "%s: load cancelled", io->file->path);
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
    return FST_OK;
}

/* ---- in place ---- */

typedef struct landing { /* of the file range [begin, end) */
    uint64_t begin;
    uint64_t end;
    unsigned char *place; /* where it belongs */
    unsigned char *at;    /* where it is read to */
} landing;

/* The chunk's largest run of bytes that are neighbours in memory, too. */
static landing largest_piece(const fst_io_context *io) {
    landing l = {0};
    for (uint64_t i = io->first; i < io->count && io->segments[i].file_offset < io->end; i++) {
        const fst_segment *s = &io->segments[i];
        uint64_t begin = s->file_offset > io->begin ? s->file_offset : io->begin;
        uint64_t end = fst_min(s->file_offset + s->bytes, io->end);
        if (begin >= end || end - begin <= l.end - l.begin) continue;
        l.begin = begin;
        l.end = end;
        l.place = io->arena->data + s->arena_offset + (begin - s->file_offset);
    }
    return l;
}

/* Cuts a piece to whole blocks of the file, to be read to the nearest block boundary in its
 * own memory: other workers fill what lies beside it. Boundaries of 512 bytes would do for
 * most disks, but gained nothing (4 MiB move by 2000 bytes nearly as fast as by 200); btrfs
 * and f2fs want whole blocks, and take other reads to the page cache. */
static void settle(landing *l) {
    uint64_t low = l->begin, high = l->end;
    l->begin = fst_align_up(low, FST_DIRECT_ALIGN);
    l->end = fst_align_down(high, FST_DIRECT_ALIGN);
    uint64_t down = ((uintptr_t)l->place + (l->begin - low)) % FST_DIRECT_ALIGN;
    uint64_t up = FST_DIRECT_ALIGN - down;
    bool rise = up < down;
    if (rise && high - l->end < up) l->end -= FST_DIRECT_ALIGN;
    if (!rise && l->begin - low < down) l->begin += FST_DIRECT_ALIGN;
    l->place += l->begin - low;
    l->at = rise ? l->place + up : l->place - down;
}

/* Huge pages only: what is read into small ones becomes many pieces at the device. */
static bool may_land(const fst_arena *arena) {
    return arena->kind == FST_ARENA_ANONYMOUS && arena->bytes >= FST_HUGE_PAGE &&
           !atomic_load_explicit(&arena->small_pages, memory_order_relaxed) &&
           !atomic_load_explicit(&arena->slots_only, memory_order_relaxed);
}

/* One request, with the blocks before and behind the landing in the slot. False: the slot has
 * to do it all, and says what is wrong if that goes wrong, too. Once is enough to stop trying:
 * who reads short is likely to do so again, and each chunk would be read twice. */
static bool read_in_place(const fst_io_context *io) {
    if (!may_land(io->arena)) return false;
    landing l = largest_piece(io);
    if (l.end - l.begin < IN_PLACE_MIN) return false;
    settle(&l);
    uint64_t from = fst_align_down(io->begin, FST_DIRECT_ALIGN);
    uint64_t to = fst_align_up(io->end, FST_DIRECT_ALIGN);
    struct iovec pieces[] = {
        {io->slot, (size_t)(l.begin - from)},
        {l.at, (size_t)(l.end - l.begin)},
        {io->slot + (l.end - from), (size_t)(to - l.end)},
    };
    int skip = pieces[0].iov_len == 0, count = 3 - skip - (pieces[2].iov_len == 0);
    ssize_t got = FST_SYS->preadv(io->direct_fd, pieces + skip, count, (off_t)from);
    if (got < 0 || (uint64_t)got < io->end - from) {
        atomic_store(&io->arena->slots_only, true);
        return false;
    }
    if (l.place != l.at) /* first: it lies where others belong */
        memmove(l.place, l.at, (size_t)(l.end - l.begin));
    scatter(io, io->begin, l.begin);
    scatter(io, l.end, io->end);
    return true;
}

int fst_io_direct(const fst_io_context *io, fst_error *err) {
    int code = check(io, err);
    if (code != FST_OK || read_in_place(io)) return code;
    code = fst_io_direct_slot(io, err);
    if (code == FST_OK) scatter(io, io->begin, io->end);
    return code;
}
