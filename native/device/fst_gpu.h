/* fst_gpu.h - devices, their streams and events, and the order of copies.
 *
 * Order on a device, and what would go wrong without it. Tests build the engine with one rule
 * left out (-DFST_OMIT=rule) and see wrong bytes:
 *
 *   ALLOCATION  A block from torch's allocator may have work pending on the stream it was
 *               allocated on. Our streams wait for what was pending there when the job began;
 *               else that work comes later and overwrites what we copied.
 *   SLOT        A copy reads its slot when the device gets to it. The slot is filled again
 *               only after the copy's event; else the copy takes the next chunk's bytes.
 *   LANDED      A chunk counts as landed only after its event, and tensors are handed out
 *               when theirs have landed; else their user, on a stream of its own, reads old
 *               bytes.
 *   RELEASE     A job lets go of its arena only after the last copy into it, also when it
 *               failed or was cancelled; else the copy overwrites the next owner's bytes.
 *   STAGING     The same as SLOT, for the device memory that cuFile reads land in.
 *   CAPTURE     While any thread captures a graph in CUDA's default "global" mode, other threads
 *               may not ask for an event, pin memory or the like; else the call fails and the
 *               capture is void. A thread in "relaxed" mode may, and what it does is no part of
 *               the graph. Threads are in that mode from fst_gpu_enter to fst_gpu_leave, and
 *               make no such call outside. A driver from before CUDA 10.1 has no modes.
 *
 * And one of host memory:
 *
 *   ASK         Releasing a job does not wait for a fed file's callback. What the callback
 *               brought goes on only if the job was not given up meanwhile; else it is
 *               written to memory that is its owner's again.
 */
#pragma once

#include <pthread.h>

#include "base/fst_base.h"

#define FST_RULE_ALLOCATION 1
#define FST_RULE_SLOT 2
#define FST_RULE_LANDED 3
#define FST_RULE_RELEASE 4
#define FST_RULE_STAGING 5
#define FST_RULE_CAPTURE 6
#define FST_RULE_ASK 7
#ifndef FST_OMIT
#define FST_OMIT 0
#endif
#define FST_KEEPS(rule) (FST_OMIT != (rule))

#define FST_STREAMS 4
#define FST_GPU_NOT_READY 600 /* CUDA_ERROR_NOT_READY and hipErrorNotReady */

typedef struct fst_gpu { /* one driver library; lives as long as the process */
    int kind;
#define FST_GPU_SYMBOL(field, cuda, hip, arguments) int(*field) arguments;
#include "device/fst_gpu.def"
#undef FST_GPU_SYMBOL
    int (*exchange_capture_mode)(int *mode); /* NULL in old drivers */
    int (*cuda_error_name)(int status, const char **name);
    const char *(*hip_error_name)(int status);
    char *library; /* as asked for; NULL for the usual one */
    struct fst_gpu *next;
} fst_gpu;

struct fst_device {
    const fst_gpu *gpu;
    int ordinal;
    int handle;    /* CUdevice */
    void *context; /* CUDA only */
    int numa_node;
    void *streams[FST_STREAMS];
    pthread_mutex_t lock; /* of the spare events */
    void **events;
    uint64_t events_count, events_room;
    fst_device *next;
};

/* Makes the device current for this thread, and keeps its calls out of captures (CAPTURE), until
 * fst_gpu_leave, which is called exactly when this succeeded. */
typedef struct fst_gpu_scope {
    const fst_device *device;
    int before;       /* HIP's current device */
    int capture_mode; /* the thread's, before */
    bool relaxed;     /* whether it was changed */
} fst_gpu_scope;
int fst_gpu_enter(const fst_device *device, fst_gpu_scope *scope, fst_error *err);
/* Tries again when the driver refuses once: for clean-up that must not be skipped. */
int fst_gpu_enter_surely(const fst_device *device, fst_gpu_scope *scope, fst_error *err);
void fst_gpu_leave(const fst_gpu_scope *scope);

/* How a device's memory relates to the host's: whether the driver says so. */
enum fst_gpu_memory {
    FST_GPU_INTEGRATED = 0,      /* it is the host's memory */
    FST_GPU_HOST_PAGE_TABLES = 1 /* pageable memory is read by the page tables of the host */
};
bool fst_gpu_memory_is(const fst_device *device, enum fst_gpu_memory what);

/* Puts the address of a library's function into *field; false: there is none. */
bool fst_gpu_find(void *library, const char *name, void *field);
/* FST_E_DEVICE with the device, the call and the driver's name for the status. */
int fst_gpu_fail(fst_error *err, const fst_device *device, const char *call, int status);

/* With the device current. Events are reused; NULL with *err filled when none can be had. */
void *fst_gpu_take_event(fst_device *device, fst_error *err);
void fst_gpu_give_event(fst_device *device, void *event);
