/* fst_batch.h - DLPack descriptions of many tensors, without Python. */
#pragma once

#include "tensor/fst_arena.h"
#include "tensor/fst_dlpack.h"

typedef struct fst_batch fst_batch;

/* Describes count tensors over an arena in one block of memory. Every element must then
 * be given away once (its deleter runs once) or taken back with fst_batch_drop, and at the
 * end the creator drops one more, its own. */
int fst_batch_create(fst_arena *arena, const fst_layout_view *view, const uint64_t *which,
                     uint64_t count, const uint64_t *offsets, uint64_t file_base,
                     const fst_dl_dtype *table, fst_batch **out, fst_error *err);
dl_managed_versioned *fst_batch_versioned(fst_batch *batch, uint64_t i);
dl_managed *fst_batch_plain(fst_batch *batch, uint64_t i);
/* Takes back elements that were not given away; the last one frees the batch. */
void fst_batch_drop(fst_batch *batch, uint64_t elements);
