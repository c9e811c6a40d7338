/* fake_cuda.h - how tests control the fake device driver, libfake_cuda.so.
 *
 * The library exports what the engine uses of libcuda, libamdhip64 and libcufile
 * (fake_driver.def) over host memory, and these functions beside it. It is adversarial:
 * what the real API leaves open happens in the way that hurts most. How to build it:
 * fake_cuda.c. Plain C types only, so that ctypes can call everything.
 *
 * Thread safety: all functions may be called from any thread, but fake_reset, fake_clear
 * and fake_mode only while no other thread is in the library.
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#pragma GCC visibility push(default)

/* What fresh and freed memory is filled with, and what work pending on a block writes. */
enum {
    FAKE_FRESH = 0xCB,
    FAKE_FREED = 0xDE,
    FAKE_LATE = 0xFA
};

/* ---- the whole ---- */

/* Drops everything and goes back to defaults: late, 1 device, nothing initialised. Handles
 * from before are invalid ever after; DLPack structs given out may still be deleted. */
void fake_reset(void);
/* Between tests of a program that keeps its device open: runs what is pending, then forgets
 * faults, counters, violations and freed blocks, and goes back to default settings.
 * Initialisation, contexts, streams, events, registrations and live blocks stay. */
void fake_clear(void);

enum {
    FAKE_LATE_MODE = 0,  /* nothing runs until it is forced, and then only what must */
    FAKE_RANDOM_MODE = 1 /* a thread runs pending work in any legal order, with pauses */
};
void fake_mode(int mode, uint64_t seed);
void fake_devices(int count);           /* 0..16; default 1; before initialisation */
void fake_device_bytes(uint64_t bytes); /* total memory of each; default 16 GiB */
/* What every device says of its memory (0 or 1): that it is the host's; and that it reads pageable
 * memory by the host's page tables. With the latter, cuMemHostRegister_v2 pins nothing. */
void fake_unified(int integrated, int host_page_tables);
void fake_query_delay(int queries);   /* answers "not ready" to each record; default 2 */
void fake_free_copies(int on);        /* work is done at once and moves no bytes */
void fake_quarantine(uint64_t bytes); /* freed memory kept and watched; default 64 MiB */
void fake_dlpack_device(int type);    /* of fake_block: 1 CPU (default), 2 CUDA, 10 ROCm */
void fake_close_stdin(int on);        /* cuFileDriverOpen closes descriptor 0 */

/* ---- failures ---- */

/* Makes calls first .. first+count-1 (from 1, counted from the last reset or clear) of an
 * exported function fail with a code. count 0: the device is lost at call first. first 0:
 * never mind. cuFileRead returns -code from 5000 on, else -1 with errno; error names and
 * cuFileHandleDeregister cannot fail.
 * Returns 0, or -1 for an unknown name. */
int fake_fail(const char *name, uint64_t first, uint64_t count, int code);
/* Pinning (cuMemHostAlloc, cuMemHostRegister_v2, hipHostRegister) fails with "out of memory". */
void fake_refuse_pin(uint64_t first, uint64_t count);
/* From now on every call but for error names returns the code; pending work never runs.
 * 0: the device is back. */
void fake_lose_device(int code);
uint64_t fake_calls(const char *name); /* failed ones too; of an unknown name 0 */

/* ---- pending work ---- */

/* Runs all that is pending, in the most hurtful legal order: newest streams first, the
 * allocator's last. */
void fake_drain(void);
uint64_t fake_pending(void); /* operations: copies, fills, event records and waits */
/* While on, a thread that makes no calls here captures a graph, in CUDA's default "global" mode.
 * Calls that a stream does not order (events made, asked or waited for, streams made or waited
 * for, memory allocated, freed, pinned or unpinned, all of cuFile) then fail with 900 and void
 * the capture, which is a violation, but for threads in "relaxed" mode. CUDA gives no complete
 * list of its "potentially unsafe" calls, and lets "thread local" mode pass, too; some HIP does
 * not (pytorch #177309). */
void fake_capture(int on);

/* ---- somebody else's memory and streams ---- */

/* A stream to allocate on, as torch's caching allocator has one. It is not counted as live,
 * and needs no context to be retained. 0 when there is no such device. */
uintptr_t fake_stream(int device);
/* Waits for all work pending on a stream; needs no context. */
int fake_synchronize(int device, uintptr_t stream);
/* A block as torch's allocator hands it out: *managed is a DLManagedTensor, 1-D uint8, over memory
 * on which work is still pending on the stream (0: the default one), which fills the block with
 * FAKE_LATE. It starts at a multiple of 512 but not of 4096 bytes. Its deleter may be called on any
 * thread. At that time no work of other streams may be pending on the block, except of streams that
 * were recorded on it. When more bytes are freed than fake_quarantine keeps, a freed block is
 * handed out again at once, on its own stream only: work still pending there is ordered before the
 * next owner's, and other streams are not waited for. Returns 0 or a CUDA error. */
int fake_block(uint64_t bytes, int device, uintptr_t stream, void **managed);
/* Like torch's Tensor.record_stream, for the block at an address: once it is freed, it is not
 * reused before the work that is pending on this stream at that time has run. */
int fake_record_stream(uintptr_t memory, uintptr_t stream);
/* A copy of torch's own, such as a view's clone, pending on a stream: it reads elements when it
 * runs, and writes them one behind another. Strides are the source's, in elements. */
int fake_copy_strided(uintptr_t to, uintptr_t from, int dims, const int64_t *shape,
                      const int64_t *strides, uint64_t itemsize, int device, uintptr_t stream);
/* Makes the caller's memory a block of a device, with the same pending work. The memory must stay
 * until fake_forget, and copies into it must have run before that. */
int fake_note(void *memory, uint64_t bytes, int device, uintptr_t stream);
int fake_forget(void *memory);

/* ---- what happened ---- */

/* How often the API's rules were broken. Writes to freed memory count. */
uint64_t fake_violations(void);
const char *fake_violation_text(uint64_t i); /* of the first 64; else "" */
uint64_t fake_copied_bytes(void);            /* by copies that have run, in any direction */
uint64_t fake_pageable_copies(void);         /* from or to host memory that is not pinned */
int fake_current_depth(void);                /* contexts on the calling thread's stack */

typedef struct fake_counts { /* without what is the allocator's */
    int32_t contexts;        /* retained more often than released */
    int32_t streams;
    int32_t events;
    int32_t ranges; /* host memory registered, or allocated by the driver */
    uint64_t range_bytes;
    int32_t blocks; /* live, from every source */
    int32_t file_driver;
    uint64_t block_bytes;
    int32_t file_handles;
    int32_t file_buffers;
} fake_counts;
void fake_live(fake_counts *out);

/* ---- the drivers ---- */

typedef struct fake_file_error { /* CUfileError_t */
    int error;
    int cuda_error;
} fake_file_error;

typedef struct fake_file_descriptor { /* CUfileDescr_t */
    int type;                         /* 1: a descriptor */
    union {
        int fd;
        void *handle;
    } handle;
    const void *operations;
} fake_file_descriptor;

#define FAKE_FUNCTION(result, name, arguments) result name arguments;
#include "fake_driver.def"
#undef FAKE_FUNCTION

#pragma GCC visibility pop

#endif
