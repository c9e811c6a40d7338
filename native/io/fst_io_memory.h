/* fst_io_memory.h - an upload's chunk into its slot. */
#pragma once

#include "io/fst_pieces.h"

int fst_io_memory(const fst_io_context *io, fst_error *err);
