/* fst_io_cache.h - a chunk of a file into the page cache, and into its map's page table. */
#pragma once

#include "io/fst_pieces.h"

/* Returns 0 when the chunk is resident (and, where the kernel can, mapped), ENOBUFS when
 * it needs a slot for that, else why it gave up. */
int fst_io_prefetch(const fst_io_context *io, uint64_t *cold_bytes);
/* Reads the missing part of the chunk into the page cache, many pages at a time. */
void fst_io_fill_cache(const fst_io_context *io);
/* The rest of a chunk for which fst_io_prefetch asked for a slot; returns as it does. */
int fst_io_read_through(const fst_io_context *io);
