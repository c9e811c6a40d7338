/* fst_gds.h - cuFile: reads that land in device memory. */
#pragma once

#include "device/fst_gpu.h"
#include "io/fst_pieces.h"

/* FST_E_INVALID from any of these: use the ring instead. */

typedef struct fst_staging { /* device memory that cuFile reads land in */
    fst_device *device;
    uintptr_t address; /* page aligned, in block */
    uint64_t bytes;
    uintptr_t block;
    struct fst_staging *next;
} fst_staging;

/* Registers a descriptor opened with O_DIRECT. The first call of a process opens the driver. */
int fst_gds_register(fst_device *device, int fd, void **handle, fst_error *err);
void fst_gds_deregister(fst_device *device, void *handle);
const char *fst_gds_kind(void); /* whether nvidia-fs moves the bytes, or cuFile bounces them */
int fst_gds_take(fst_device *device, uint64_t bytes, fst_staging **out, fst_error *err);
void fst_gds_give(fst_staging *staging);
/* The file's bytes from fst_align_down(begin, FST_DIRECT_ALIGN) on, into the staging block. */
int fst_gds_read(const fst_io_context *io, void *handle, const fst_staging *staging,
                 fst_error *err);
void fst_gds_clear(void); /* frees what is not in use */
