/* fst_io_prefetch.c - pull a chunk of a file into the page cache, and into its map's page table.
 *
 * Where a map is advised to be in huge pages, a fault reads 2 MiB into one folio, whatever the
 * read-ahead setting (Linux 5.18), and maps it by one entry (on file systems with large
 * folios). MADV_POPULATE_READ faults the chunk in, so that the reader takes no faults. No byte
 * is copied. 1.7 GB on a virtual disk, 2 cores, 8 threads beside the reader, medians of 5
 * alternating runs, at 128 KiB and 8 MiB read-ahead: 0.96 and 0.87 s, and 0.2 s of processor
 * time; by readahead() and small pages 1.33 and 1.54 s, 0.8 s of processor time; plain faults
 * 1.95 and 1.21 s. Reading the file again, then cached, takes 0.12 s after the first, 0.3 s
 * after the second.
 *
 * Where a fault turns out to read less, readahead() in pieces queues the whole chunk at the
 * device first. What is cached already is left alone: populating it beside the reader gained
 * nothing, and costs whoever loads more than he reads.
 *
 * Buffered reads fill the cache in the same way, through a map that lasts as long: 1.02 and
 * 1.13 s in the same setting, where reads alone took 1.48 and 1.75 s, and after readahead()
 * 1.60 and 1.70 s.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "fst_internal.h"
#include "fst_sys.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

/* One call reads at most what the device takes in one request (often 512 KiB to 4 MiB)
 * and silently drops the rest. */
#define READAHEAD_BYTES (512u << 10)
#define POPULATE_TRIES 1000

static void queue_reads(const fst_io_context *io, uint64_t begin, uint64_t end) {
    for (uint64_t at = begin; at < end; at += READAHEAD_BYTES) {
        size_t bytes = (size_t)fst_min(READAHEAD_BYTES, end - at);
        if (FST_SYS->readahead(io->file->fd, (off_t)at, bytes) != 0) return; /* advice only */
    }
}

/* Kernels before 5.14: read the chunk into the worker's slot, which caches it too. */
int fst_io_read_through(const fst_io_context *io) {
    for (uint64_t at = io->begin; at < io->end;) {
        if (atomic_load_explicit(io->stop, memory_order_relaxed)) return ECANCELED;
        size_t bytes = (size_t)fst_min(io->slot_bytes, io->end - at);
        ssize_t got = FST_SYS->pread(io->file->fd, io->slot, bytes, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return ENODATA; /* truncated: the reader will meet it as stock does */
        at += (uint64_t)got;
    }
    return 0;
}

/* Faults file bytes [begin, end) in; mapped is where the page of io->begin is mapped. */
static int populate(const fst_io_context *io, unsigned char *mapped, uint64_t begin, uint64_t end) {
    uint64_t page = fst_page(), first = fst_align_down(begin, page);
    unsigned char *from = mapped + (first - fst_align_down(io->begin, page));
    size_t bytes = (size_t)(fst_align_up(end, page) - first);
    for (int tries = 0; tries < POPULATE_TRIES; tries++) {
        if (FST_SYS->madvise(from, bytes, MADV_POPULATE_READ) == 0) return 0;
        if (errno != EINTR && errno != EAGAIN) return errno;
        if (atomic_load_explicit(io->stop, memory_order_relaxed)) return ECANCELED;
    }
    return EAGAIN;
}

/* What of a chunk is read by huge pages: whole ones, since a neighbour may be nobody's wish, such
 * as experts of other ranks. The header before the first and the end of the file are no loss. */
typedef struct huge_range {
    uint64_t begin, end;
    bool tail_alone; /* behind it nothing is wanted, or by small pages */
} huge_range;

static huge_range huge_part(const fst_io_context *io) {
    bool first = io->begin < FST_HUGE_PAGE, last = io->end >= io->file->info.size;
    huge_range part = {
        .begin = first ? io->begin : fst_align_up(io->begin, FST_HUGE_PAGE),
        .end = last ? io->end : fst_align_down(io->end, FST_HUGE_PAGE),
    };
    part.tail_alone = part.end < io->end;
    return part;
}

/* Asks for huge pages, and tries on the first page whether a fault brings one. */
static bool faults_are_huge(const fst_io_context *io, unsigned char *mapped, huge_range part) {
    uint64_t page = fst_page(), base = fst_align_down(io->begin, page), resident = 0;
    int probe = FST_PROBE_NONE;
    /* Of less, a fault would read more than is wanted. */
    if (part.end < part.begin || part.end - part.begin < FST_HUGE_PAGE) return false;
    uint64_t first = fst_align_down(part.begin, page);
    uint64_t huge_end = fst_align_down(part.begin, FST_HUGE_PAGE) + FST_HUGE_PAGE;
    unsigned char *from = mapped + (first - base);
    if (FST_SYS->madvise(from, (size_t)(part.end - first), MADV_HUGEPAGE) != 0) return false;
    /* A fault asks for the next huge page, too, unless it is told that accesses are random. */
    if (part.tail_alone)
        (void)FST_SYS->madvise(mapped + (part.end - FST_HUGE_PAGE - base), FST_HUGE_PAGE,
                               MADV_RANDOM);
    if (populate(io, mapped, part.begin, part.begin + 1) != 0) return false;
    (void)fst_file_residency((fst_file *)(uintptr_t)io->file, first, huge_end - first, &resident,
                             &probe);
    return resident == huge_end - first;
}

static uint64_t cold_bytes_of(const fst_io_context *io) {
    uint64_t resident = 0, length = io->end - io->begin;
    int probe = FST_PROBE_NONE;
    (void)fst_file_residency((fst_file *)(uintptr_t)io->file, io->begin, length, &resident, &probe);
    return length - fst_min(resident, length);
}

static int fill(const fst_io_context *io, unsigned char *mapped) {
    huge_range part = huge_part(io);
    /* Who reads a page in which a huge fault left its mark reads on behind what is wanted. */
    if (atomic_load(&io->file->exactly) || !faults_are_huge(io, mapped, part)) {
        queue_reads(io, io->begin, io->end);
    } else {
        queue_reads(io, io->begin, part.begin);
        queue_reads(io, part.end, io->end);
    }
    return populate(io, mapped, io->begin, io->end);
}

void fst_io_fill_cache(const fst_io_context *io) {
    if (cold_bytes_of(io) == 0) return;
    uint64_t first = fst_align_down(io->begin, fst_page());
    size_t bytes = (size_t)(fst_align_up(io->end, fst_page()) - first);
    void *map = FST_SYS->mmap(NULL, bytes, PROT_READ, MAP_SHARED, io->file->fd, (off_t)first);
    if (map == MAP_FAILED) {
        queue_reads(io, io->begin, io->end);
        return;
    }
    if (atomic_load(&io->file->exactly)) (void)FST_SYS->madvise(map, bytes, MADV_RANDOM);
    (void)fill(io, map); /* whatever is wrong, the read that follows says it */
    (void)munmap(map, bytes);
}

int fst_io_prefetch(const fst_io_context *io, uint64_t *cold_bytes) {
    *cold_bytes = cold_bytes_of(io);
    if (*cold_bytes == 0) return 0; /* faulting it in is cheap, and only if it is used */
    int code = fill(io, io->arena->data + fst_align_down(io->begin, fst_page()));
    if (code != EINVAL) return code;
    return io->slot == NULL ? ENOBUFS : fst_io_read_through(io);
}
