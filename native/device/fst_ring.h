/* fst_ring.h - the pinned slots that copies to devices start from. */
#pragma once

#include "base/fst_pages.h"
#include "device/fst_gpu.h"

typedef struct fst_slot {
    fst_pages pages;
    fst_device *device; /* that pinned it; any device of the same driver may use it */
    bool pinned;        /* false: pinning was refused, and copies from it are slower */
    bool drivers;       /* the driver allocated it, in place of pinning memory of ours */
    struct fst_slot *next;
} fst_slot;

/* A slot of at least so many bytes, pinning no more than the limit in all. FST_PENDING: every
 * slot is in use (waits until one was given back, if asked to); give one back, or ask again.
 * FST_E_NOMEM: there is none. Never called with a lock held or the device current. */
int fst_ring_take(fst_device *device, uint64_t bytes, uint64_t pinned_limit, bool wait,
                  fst_slot **out, fst_error *err);
void fst_ring_give(fst_slot *slot);
void fst_ring_clear(void); /* unpins what is not in use */
void fst_ring_stats(uint64_t *pinned_bytes, uint64_t *pinned_nanoseconds);
