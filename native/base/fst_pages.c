/* fst_pages.c - anonymous memory in huge pages: what arenas and read buffers are made of. */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/fst_pages.h"
#include "base/fst_sys.h"

/* Huge pages need the alignment, and O_DIRECT needs huge pages: a read into small pages becomes as
 * many requests at the device (1.7 GB: 1.39 s unaligned, 0.87 s aligned). */
int fst_pages_map(fst_pages *pages, uint64_t bytes) {
    /* Small allocations use small pages: a huge page would cost 2 MiB for a scalar. */
    bool huge = bytes >= FST_HUGE_PAGE;
    uint64_t alignment = huge ? FST_HUGE_PAGE : fst_page();
    *pages = (fst_pages){0};
    if (bytes > SIZE_MAX / 2 - 2u * FST_HUGE_PAGE) return ENOMEM;
    uint64_t mapped = fst_align_up(bytes == 0 ? 1 : bytes, alignment) + (huge ? alignment : 0);
    unsigned char *map = FST_SYS->mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return errno;
    pages->map = map;
    pages->map_bytes = mapped;
    pages->data = map + (alignment - (uintptr_t)map % alignment) % alignment;
    pages->bytes = bytes;
    /* Advice only: refused where huge pages are off, and nothing is lost. */
    if (huge)
        (void)FST_SYS->madvise(pages->data, (size_t)(mapped - (uint64_t)(pages->data - map)),
                               MADV_HUGEPAGE);
    return 0;
}

void fst_pages_unmap(fst_pages *pages) {
    if (pages->map != NULL) (void)munmap(pages->map, (size_t)pages->map_bytes);
    *pages = (fst_pages){0};
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
#define POPULATE_TRIES 1000

uint64_t fst_memory_huge(void *begin, uint64_t bytes, int fill) {
    uintptr_t address = (uintptr_t)begin;
    if (bytes > UINTPTR_MAX - address) return UINT64_MAX;
    uint64_t first = fst_align_up(address, FST_HUGE_PAGE);
    uint64_t end = fst_align_down(address + bytes, FST_HUGE_PAGE);
    if (first >= end) return 0;
    uint64_t before = fst_nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    unsigned char *data = (unsigned char *)begin + (first - address);
    if (FST_SYS->madvise(data, (size_t)(end - first), MADV_HUGEPAGE) != 0) return UINT64_MAX;
    for (int tries = 0; fill; tries++) {
        if (FST_SYS->madvise(data, (size_t)(end - first), MADV_POPULATE_WRITE) == 0) break;
        if ((errno != EINTR && errno != EAGAIN) || tries == POPULATE_TRIES) return UINT64_MAX;
    }
    return fst_nanoseconds(CLOCK_THREAD_CPUTIME_ID) - before;
}
