/* fst_io_cache.c - pull a chunk of a file into the page cache, and into its map's page table.
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
 * device first. Chunks that are cached already are left alone: to populate them beside the reader
 * gained nothing, and costs a program time for tensors that it does not read.
 *
 * Buffered reads fill the cache in the same way, through a map that lasts as long: 1.02 and
 * 1.13 s in the same setting, where reads alone took 1.48 and 1.75 s, and after readahead()
 * 1.60 and 1.70 s.
 */
#include <errno.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <time.h>

#include "base/fst_sys.h"
#include "io/fst_fill_mode.h"
#include "io/fst_io_cache.h"

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

/* Where file bytes are mapped: a byte at file offset X lies at base + (X - origin). */
typedef struct mapped {
    unsigned char *base; /* NULL: there is no such map */
    uint64_t origin;
} mapped;

/* Calls madvise for the pages of file bytes [begin, end). */
static int advise(mapped map, uint64_t begin, uint64_t end, int advice) {
    uint64_t first = fst_align_down(begin, fst_page());
    size_t bytes = (size_t)(fst_align_up(end, fst_page()) - first);
    return FST_SYS->madvise(map.base + (first - map.origin), bytes, advice);
}

/* Faults file bytes [begin, end) in. Returns 0 or an errno. */
static int populate(const fst_io_context *io, mapped map, uint64_t begin, uint64_t end) {
    if (begin >= end) return 0;
    for (int tries = 0; tries < POPULATE_TRIES; tries++) {
        if (advise(map, begin, end, MADV_POPULATE_READ) == 0) return 0;
        if (errno != EINTR && errno != EAGAIN) return errno;
        if (atomic_load_explicit(io->stop, memory_order_relaxed)) return ECANCELED;
    }
    return EAGAIN;
}

/* The part of a chunk that is read by huge pages: whole pages only, since the bytes beside it may
 * be unwanted, such as experts of other ranks. The file's header and end may be read with it. */
typedef struct huge_range {
    uint64_t begin, end;
    uint64_t alone; /* from here on a fault may not read the next huge page: it is another chunk's,
                       or unwanted */
} huge_range;

static huge_range huge_part(const fst_io_context *io) {
    bool first = io->begin < FST_HUGE_PAGE, last = io->end >= io->file->info.size;
    huge_range part = {
        .begin = first ? io->begin : fst_align_up(io->begin, FST_HUGE_PAGE),
        .end = last ? io->end : fst_align_down(io->end, FST_HUGE_PAGE),
    };
    /* With less than a huge page, a fault would read more than is wanted. */
    if (part.end < part.begin || part.end - part.begin < FST_HUGE_PAGE) part.end = part.begin;
    part.alone = part.begin < part.end ? part.end - FST_HUGE_PAGE : part.end;
    return part;
}

static uint64_t major_faults(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? (uint64_t)usage.ru_majflt : 0;
}

/* Whether a fault at the first byte brought the whole huge page. */
static bool came_whole(const fst_io_context *io, huge_range part) {
    uint64_t first = fst_align_down(part.begin, fst_page()), resident = 0;
    uint64_t end = fst_min(fst_align_down(part.begin, FST_HUGE_PAGE) + FST_HUGE_PAGE, part.end);
    int probe = FST_PROBE_NONE;
    fst_file *file = io->file;
    (void)fst_file_residency(file, first, end - first, &resident, &probe);
    if (probe != FST_PROBE_NONE) return resident == end - first;
    return fst_file_has_page(file, fst_align_down(end - 1, fst_page())); /* else it is on its way */
}

/* Reads a part by huge pages; false: faults bring less, or there is no map for them. */
static bool read_huge(const fst_io_context *io, mapped huge, huge_range part) {
    if (huge.base == NULL) return false;
    return populate(io, huge, part.begin, part.begin + 1) == 0 && came_whole(io, part) &&
           populate(io, huge, part.begin, part.end) == 0;
}

typedef struct file_range {
    uint64_t begin, end;
} file_range;

/* Counts the bytes of the chunk that are not cached; false: no probe can see them. */
static bool probed(const fst_io_context *io, uint64_t *cold) {
    uint64_t resident = 0, length = io->end - io->begin;
    int probe = FST_PROBE_NONE;
    (void)fst_file_residency(io->file, io->begin, length, &resident, &probe);
    *cold = length - fst_min(resident, length);
    return probe != FST_PROBE_NONE;
}

/* How many bytes of the chunk are not cached. Without a probe it faults in a byte of each huge
 * page, and returns all bytes if a fault had to read. Those faults read wanted bytes only. */
static uint64_t cold_bytes_of(const fst_io_context *io, mapped huge, huge_range part) {
    uint64_t cold, length = io->end - io->begin, before = major_faults();
    if (probed(io, &cold)) return cold;
    if (huge.base == NULL) return length;
    for (uint64_t at = part.begin; at < part.end; at += FST_HUGE_PAGE)
        if (populate(io, huge, at, at + 1) != 0) return length;
    return major_faults() == before ? 0 : length;
}

/* The part of a chunk that is read by faults through an open file description of its own: all but
 * the ends, since the first fault also reads half a window before it, and the last may read
 * two windows beyond. Empty where the window is unknown, or too large for the folios to grow. */
static file_range faulted_part(const fst_io_context *io) {
    uint64_t window = fst_file_window(io->file), page = fst_page();
    file_range part = {io->begin, io->begin};
    if (window < page || window > (io->end - io->begin) / 8 || atomic_load(&io->file->exactly))
        return part;
    part.begin = fst_align_up(io->begin + window / 2, page);
    part.end = fst_align_down(io->end - 2 * window, page);
    return part;
}

/* Reads a chunk by such faults. Their read-ahead follows this worker alone, so folios grow to the
 * window's size, and the device gets larger requests than from the single pages of readahead().
 * 1.7 GB, 128 KiB read-ahead, 8 threads, medians of 5: 1.1 to 1.3 s instead of 1.9 s. Enters
 * nothing in the tensors' page table. Returns 0 or an errno. */
static int read_by_faults(const fst_io_context *io, file_range part) {
    int fd = fst_file_open_again(io->file), code = 0;
    if (fd < 0) return errno;
    size_t bytes = (size_t)(part.end - part.begin);
    void *base = FST_SYS->mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, (off_t)part.begin);
    if (base == MAP_FAILED) {
        code = errno;
    } else {
        queue_reads(io, io->begin, part.begin);
        queue_reads(io, part.end, io->end);
        code = populate(io, (mapped){base, part.begin}, part.begin, part.end);
        (void)munmap(base, bytes);
    }
    (void)close(fd);
    return code;
}

/* Where the read-ahead window is large, the kernel's own windows grow within a chunk: a read beside
 * the last one of the same open file description starts the first window, and a touch of the page
 * that the kernel marked starts the next one, of larger folios. A window is four times the last one
 * below a sixteenth of the largest, then twice (Linux 2.6.23); kernels that align its end make it
 * smaller, so cachestat tells. */
#define FIRST_READ (16u << 10)

static ssize_t touch_ahead(int fd, uint64_t offset, size_t bytes, int flags) {
    unsigned char read[FIRST_READ];
    struct iovec to = {read, bytes};
    return FST_SYS->preadv2(fd, &to, 1, (off_t)offset, flags);
}

/* How far from begin reads were started, of at most so many bytes; 0 where only guesses tell. */
static uint64_t started(const fst_io_context *io, uint64_t begin, uint64_t most) {
    uint64_t resident = 0;
    int probe = FST_PROBE_NONE;
    (void)fst_file_residency(io->file, begin, most, &resident, &probe);
    return probe == FST_PROBE_CACHESTAT ? resident : 0;
}

/* Starts reading a cold chunk by growing windows, as far as they end within it. */
static void queue_growing(const fst_io_context *io, uint64_t largest) {
    uint64_t window = 4 * FIRST_READ, page = fst_page(), begin = fst_align_up(io->begin + 1, page);
    uint64_t mark = begin + FIRST_READ;
    int fd = begin + window <= io->end && window <= largest ? fst_file_open_again(io->file) : -1;
    if (fd < 0) return;
    /* The first page is asked for without read-ahead, which would go by the pages before it. */
    bool first = FST_SYS->readahead(fd, (off_t)io->begin, page) == 0 &&
                 touch_ahead(fd, begin - 1, 1, 0) == 1;
    if (first) (void)touch_ahead(fd, begin, FIRST_READ, RWF_NOWAIT);
    while (first && (window = started(io, begin, window)) > 0) {
        begin += window;
        window *= window < largest / 16 ? 4 : 2;
        if (window > largest || begin + window > io->end) break;
        (void)touch_ahead(fd, mark, 1, RWF_NOWAIT); /* starts reads, waits for none */
        mark = begin;
    }
    (void)close(fd);
}

/* Reads a chunk by requests, and waits for the last page of each, through a map of its own: faults
 * of the tensors' map on a page that is marked would read on behind the chunk. Enters nothing in
 * the tensors' page table. 1.7 GB, 8 MiB read-ahead, only small pages free: 1.3 s, where single
 * pages took 1.5 to 2.2 s. Returns 0 or an errno. */
static int read_by_requests(const fst_io_context *io, bool cold) {
    uint64_t first = fst_align_down(io->begin, fst_page());
    size_t bytes = (size_t)(fst_align_up(io->end, fst_page()) - first);
    int code = 0;
    void *base = FST_SYS->mmap(NULL, bytes, PROT_READ, MAP_SHARED, io->file->fd, (off_t)first);
    if (base == MAP_FAILED) return errno;
    mapped map = {base, first};
    (void)advise(map, io->begin, io->end, MADV_RANDOM);
    if (cold && !atomic_load(&io->file->exactly)) queue_growing(io, fst_file_window(io->file));
    queue_reads(io, io->begin, io->end); /* what is left; the rest is asked for already */
    for (uint64_t at = io->begin; at < io->end && code == 0; at += READAHEAD_BYTES) {
        uint64_t end = fst_min(at + READAHEAD_BYTES, io->end);
        code = populate(io, map, end - 1, end);
    }
    (void)munmap(base, bytes);
    return code;
}

/* Whether both ends of the chunk are cached. It reads nothing. */
static bool ends_cached(const fst_io_context *io) {
    fst_file *file = io->file;
    return fst_file_has_page(file, fst_align_down(io->begin, fst_page())) &&
           fst_file_has_page(file, fst_align_down(io->end - 1, fst_page()));
}

/* Brings the chunk into the page cache, or on its way there. */
static void fill(const fst_io_context *io, mapped huge, huge_range part) {
    if (read_huge(io, huge, part)) {
        queue_reads(io, io->begin, part.begin);
        queue_reads(io, part.end, io->end);
    } else {
        queue_reads(io, io->begin, io->end);
    }
}

/* A map of the chunk alone, for the time of one call. Advice on the tensors' own map would split it
 * into areas: a process may have some 65,000, and 257 stripes took 527 of them. */
typedef struct chunk_map {
    mapped whole; /* base is NULL where it was refused */
    mapped huge;  /* the same; base is NULL where huge pages are not for this chunk */
    size_t bytes;
} chunk_map;

static chunk_map map_chunk(const fst_io_context *io, huge_range part) {
    uint64_t first = fst_align_down(io->begin, fst_page());
    chunk_map map = {.bytes = (size_t)(fst_align_up(io->end, fst_page()) - first)};
    bool exactly = atomic_load(&io->file->exactly);
    void *base = FST_SYS->mmap(NULL, map.bytes, PROT_READ, MAP_SHARED, io->file->fd, (off_t)first);
    if (base == MAP_FAILED) return map;
    map.whole = (mapped){base, first};
    /* A fault on the mark that a huge fault left would read on behind the wanted bytes. */
    if (exactly) (void)advise(map.whole, io->begin, io->end, MADV_RANDOM);
    if (exactly || part.begin == part.end ||
        advise(map.whole, part.begin, part.end, MADV_HUGEPAGE) != 0)
        return map;
    if (part.alone < part.end) (void)advise(map.whole, part.alone, part.end, MADV_RANDOM);
    map.huge = map.whole;
    return map;
}

static void unmap_chunk(const chunk_map *map) {
    if (map->whole.base != NULL) (void)munmap(map->whole.base, map->bytes);
}

void fst_io_fill_cache(const fst_io_context *io) {
    huge_range part = huge_part(io);
    uint64_t cold;
    if (probed(io, &cold) && cold == 0) return;
    chunk_map map = map_chunk(io, part);
    if (map.whole.base == NULL) {
        queue_reads(io, io->begin, io->end);
    } else if (cold_bytes_of(io, map.huge, part) > 0) {
        fill(io, map.huge, part);
        (void)populate(io, map.whole, io->begin, io->end); /* the read that follows reports it */
    }
    unmap_chunk(&map);
}

/* Reads a cold chunk by huge pages, and enters it in the tensors' page table. */
static int read_chunk(const fst_io_context *io, uint64_t *cold_bytes) {
    mapped tensors = {io->arena->data, 0};
    huge_range part = huge_part(io);
    chunk_map map = map_chunk(io, part);
    int code = 0;
    *cold_bytes = cold_bytes_of(io, map.huge, part);
    if (*cold_bytes > 0) {
        fill(io, map.huge, part);
        code = populate(io, tensors, io->begin, io->end);
    }
    unmap_chunk(&map);
    return code;
}

int fst_io_prefetch(const fst_io_context *io, uint64_t *cold_bytes) {
    file_range faulted = faulted_part(io);
    bool growing = faulted.begin < faulted.end, told = probed(io, cold_bytes);
    /* Faulting in what is cached is cheap, and only if it is used. */
    if (told && *cold_bytes == 0) return 0;
    int mode = fst_fill_mode_get(), code;
    uint64_t begun = fst_nanoseconds(CLOCK_MONOTONIC);
    if (mode != FST_FILL_HUGE) {
        if (!told && ends_cached(io)) *cold_bytes = 0;
        bool cold = told && *cold_bytes == io->end - io->begin;
        code = growing ? read_by_faults(io, faulted) : read_by_requests(io, cold);
        if (code != 0 && code != ECANCELED) fst_fill_mode_set(mode = FST_FILL_HUGE);
    }
    if (mode == FST_FILL_HUGE) code = read_chunk(io, cold_bytes);
    if (code == 0 && *cold_bytes == io->end - io->begin)
        fst_fill_mode_note(mode, growing, *cold_bytes, fst_nanoseconds(CLOCK_MONOTONIC) - begun);
    if (code != EINVAL) return code;
    return io->slot == NULL ? ENOBUFS : fst_io_read_through(io);
}
