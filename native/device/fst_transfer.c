/* fst_transfer.c - from a filled slot to device memory, and comparing what arrived. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "base/fst_sys.h"
#include "device/fst_transfer.h"

/* Enqueues one copy, of a piece and all that join it. */
static int copy(const fst_transfer *transfer, void *stream, const fst_io_context *io,
                const fst_piece *run, fst_error *err) {
    const fst_gpu *gpu = transfer->device->gpu;
    uintptr_t to = (uintptr_t)io->arena->data + run->at;
    size_t bytes = (size_t)run->bytes;
    int status =
        transfer->slot != NULL
            ? gpu->copy_in(to, transfer->slot->pages.data + run->in_slot, bytes, stream)
            : gpu->copy_within(to, transfer->staging->address + run->in_slot, bytes, stream);
    if (status == 0) return FST_OK;
    return fst_gpu_fail(err, transfer->device, "copying to the device", status);
}

/* Enqueues the copies of every piece of the chunk. */
static int enqueue(const fst_transfer *transfer, void *stream, const fst_io_context *io,
                   fst_error *err) {
    fst_pieces pieces = {.io = io};
    fst_piece run, piece;
    if (!fst_pieces_next(&pieces, &run)) return FST_OK;
    while (fst_pieces_next(&pieces, &piece)) {
        if (piece.joins) {
            run.bytes = piece.at + piece.bytes - run.at;
            continue;
        }
        int code = copy(transfer, stream, io, &run, err);
        if (code != FST_OK) return code;
        run = piece;
    }
    return copy(transfer, stream, io, &run, err);
}

static void give_sources(fst_transfer *transfer) {
    fst_ring_give(transfer->slot);
    fst_gds_give(transfer->staging);
    transfer->slot = NULL;
    transfer->staging = NULL;
}

int fst_transfer_start(fst_transfer *transfer, int stream, void *after, const fst_io_context *io,
                       fst_error *err) {
    fst_device *device = transfer->device;
    const fst_gpu *gpu = device->gpu;
    void *queue = transfer->queue = device->streams[stream % FST_STREAMS];
    fst_gpu_scope scope;
    int status = 0;
    int code = fst_gpu_enter(device, &scope, err);
    if (code != FST_OK) {
        give_sources(transfer);
        return code;
    }
    transfer->event = fst_gpu_take_event(device, err);
    if (transfer->event == NULL) code = err->code;
    if (code == FST_OK && FST_KEEPS(FST_RULE_ALLOCATION))
        status = gpu->stream_wait(queue, after, 0);
    if (code == FST_OK && status == 0) {
        code = enqueue(transfer, queue, io, err);
        if (code == FST_OK) status = gpu->event_record(transfer->event, queue);
        /* Some copies may be under way, and no event marks their end. */
        if (code != FST_OK || status != 0) (void)gpu->stream_sync(queue);
    }
    if (code == FST_OK && status != 0)
        code = fst_gpu_fail(err, device, "ordering copies on a stream", status);
    fst_gpu_leave(&scope);
    if (code != FST_OK) {
        fst_gpu_give_event(device, transfer->event);
        transfer->event = NULL;
        give_sources(transfer);
    }
    if (!FST_KEEPS(FST_RULE_SLOT) && transfer->slot != NULL) give_sources(transfer);
    if (!FST_KEEPS(FST_RULE_STAGING) && transfer->staging != NULL) give_sources(transfer);
    return code;
}

bool fst_transfer_ready(const fst_transfer *transfer) {
    fst_gpu_scope scope;
    fst_error ignored = {0};
    if (fst_gpu_enter(transfer->device, &scope, &ignored) != FST_OK) return true;
    int status = transfer->device->gpu->event_query(transfer->event);
    fst_gpu_leave(&scope);
    return status != FST_GPU_NOT_READY; /* a failure is for finish to report */
}

int fst_transfer_finish(fst_transfer *transfer, fst_error *err) {
    fst_device *device = transfer->device;
    fst_gpu_scope scope;
    int code = fst_gpu_enter_surely(device, &scope, err);
    if (code == FST_OK) {
        int status = device->gpu->event_sync(transfer->event);
        if (status != 0) {
            code = fst_gpu_fail(err, device, "waiting for copies", status);
            /* The error may come from other work, with our copies still pending. If the driver
             * cannot wait this way either, it copies nothing any more. */
            (void)device->gpu->stream_sync(transfer->queue);
        }
        fst_gpu_leave(&scope);
    }
    fst_gpu_give_event(device, transfer->event);
    give_sources(transfer);
    *transfer = (fst_transfer){0};
    return code;
}

/* Reads for a comparison, and evicts what that added to the page cache. */
static int read_beside(fst_file *file, uint64_t offset, void *to, uint64_t bytes, fst_error *err) {
    uint64_t resident = 0, first = fst_align_down(offset, FST_HUGE_PAGE);
    uint64_t end = fst_align_up(offset + bytes, FST_HUGE_PAGE);
    int probe = FST_PROBE_NONE;
    (void)fst_file_residency(file, offset, bytes, &resident, &probe);
    int code = fst_file_read(file, offset, to, bytes, err);
    if (code == FST_OK && file->fed == NULL) code = fst_file_check_end(file, offset + bytes, err);
    if (probe != FST_PROBE_NONE && resident < bytes)
        (void)FST_SYS->fadvise(file->info.fd, (off_t)first, (off_t)(end - first),
                               POSIX_FADV_DONTNEED);
    return code;
}

int fst_device_compare(fst_device *device, fst_arena *arena, uint64_t arena_offset, fst_file *file,
                       uint64_t file_offset, uint64_t bytes, int32_t *equal, fst_error *err) {
    *equal = 0;
    if (arena_offset > arena->bytes || bytes > arena->bytes - arena_offset || bytes > SIZE_MAX / 2)
        return fst_fail(err, FST_E_INVALID, EINVAL, "no such bytes in the arena");
    unsigned char *both = malloc(bytes == 0 ? 1 : 2 * (size_t)bytes);
    if (both == NULL)
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory to compare %llu bytes",
                        (unsigned long long)bytes);
    fst_gpu_scope scope;
    int code = read_beside(file, file_offset, both, bytes, err);
    if (code == FST_OK) code = fst_gpu_enter(device, &scope, err);
    if (code == FST_OK) {
        void *stream = device->streams[0];
        int status = device->gpu->copy_out(both + bytes, (uintptr_t)arena->data + arena_offset,
                                           (size_t)bytes, stream);
        int synced =
            device->gpu->stream_sync(stream); /* on errors, too: both is about to be freed */
        if (synced != 0) (void)device->gpu->stream_sync(stream);
        if (status == 0) status = synced;
        if (status != 0) code = fst_gpu_fail(err, device, "reading back", status);
        fst_gpu_leave(&scope);
    }
    if (code == FST_OK) *equal = memcmp(both, both + bytes, (size_t)bytes) == 0;
    free(both);
    return code;
}
