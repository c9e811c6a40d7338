/* fst_pages.h - anonymous memory in huge pages: what arenas and read buffers are made of. */
#pragma once

#include "base/fst_base.h"

typedef struct fst_pages {
    unsigned char *data;
    uint64_t bytes;
    void *map; /* what munmap takes; data lies aligned in it */
    uint64_t map_bytes;
} fst_pages;

/* Zeroed memory, 2 MiB aligned and in huge pages where it is as large as one and the system
 * allows them. Returns 0 or an errno. */
int fst_pages_map(fst_pages *pages, uint64_t bytes);
void fst_pages_unmap(fst_pages *pages); /* and empties it; nothing to do for an empty one */
