/* fst_io_direct.h - a chunk of a file with O_DIRECT, through the worker's slot. */
#pragma once

#include "io/fst_pieces.h"

/* FST_E_INVALID from either, with sys_errno: O_DIRECT refused here, nothing was moved. */
int fst_io_direct(const fst_io_context *io, fst_error *err);
/* Reads only: the file's bytes from fst_align_down(begin, FST_DIRECT_ALIGN) on lie in the slot
 * then. */
int fst_io_direct_slot(const fst_io_context *io, fst_error *err);
