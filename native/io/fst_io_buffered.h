/* fst_io_buffered.h - a chunk of a file into its places, through the page cache. */
#pragma once

#include "io/fst_pieces.h"

int fst_io_buffered(const fst_io_context *io, fst_error *err);
