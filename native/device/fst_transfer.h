/* fst_transfer.h - one chunk on its way from a slot or a staging block to its places. */
#pragma once

#include "device/fst_gds.h"
#include "device/fst_ring.h"

typedef struct fst_transfer {
    fst_device *device;
    fst_slot *slot;       /* where the bytes come from: this */
    fst_staging *staging; /* or that */
    void *event;          /* recorded behind the copies */
    void *queue;          /* the stream they are on */
} fst_transfer;

/* The bytes in transfer's slot or staging, where fst_pieces_next has them, go to the chunk's
 * places in the arena, behind the event `after`. On an error slot and staging
 * have been given back, and nothing is in flight. */
int fst_transfer_start(fst_transfer *transfer, int stream, void *after, const fst_io_context *io,
                       fst_error *err);
bool fst_transfer_ready(const fst_transfer *transfer); /* never blocks */
/* Waits until the copies are over and gives the slot back, also when the device fails. */
int fst_transfer_finish(fst_transfer *transfer, fst_error *err);
