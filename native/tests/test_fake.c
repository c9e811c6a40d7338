/* test_fake.c - the fake device driver does the harm it promises. */
#include "test.h"

#include <pthread.h>
#include <sys/wait.h>

#include "fake_open.h"
#include "fst_dlpack.h"

enum {
    BYTES = 8192,
    NON_BLOCKING = 1
};

/* Checks that one violation more has been seen. */
#define BITES(statement)                                                                           \
    do {                                                                                           \
        uint64_t violations_before = FAKE(fake_violations)();                                      \
        statement;                                                                                 \
        CHECK_EQ(FAKE(fake_violations)(), violations_before + 1);                                  \
    } while (0)

static unsigned char slot[BYTES], other_slot[BYTES];

static bool all(const void *bytes, size_t count, int value) {
    const unsigned char *byte = bytes;
    for (size_t i = 0; i < count; i++)
        if (byte[i] != value) return false;
    return true;
}

/* A driver as new, with device 0's context current. */
static void begin(void) {
    uintptr_t context;
    FAKE(fake_reset)();
    memset(slot, 1, sizeof slot);
    memset(other_slot, 2, sizeof other_slot);
    MUST(FAKE(cuInit)(0) == 0);
    MUST(FAKE(cuDevicePrimaryCtxRetain)(&context, 0) == 0);
    MUST(FAKE(cuCtxPushCurrent_v2)(context) == 0);
    MUST(FAKE(cuMemHostRegister_v2)(slot, sizeof slot, 0) == 0);
    MUST(FAKE(cuMemHostRegister_v2)(other_slot, sizeof other_slot, 0) == 0);
}

static void end(uint64_t violations) {
    if (!CHECK_EQ(FAKE(fake_violations)(), violations))
        for (uint64_t i = 0; i < FAKE(fake_violations)(); i++)
            (void)fprintf(stderr, "    %s\n", FAKE(fake_violation_text)(i));
    FAKE(fake_reset)();
}

static uintptr_t stream_new(void) {
    uintptr_t stream = 0;
    MUST(FAKE(cuStreamCreate)(&stream, NON_BLOCKING) == 0);
    return stream;
}

static uintptr_t event_new(void) {
    uintptr_t event = 0;
    MUST(FAKE(cuEventCreate)(&event, 2) == 0);
    return event;
}

static uintptr_t alloc(size_t bytes) {
    uintptr_t memory = 0;
    MUST(FAKE(cuMemAlloc_v2)(&memory, bytes) == 0);
    return memory;
}

static void copy_in(uintptr_t to, const void *from, uintptr_t stream) {
    CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)(to, from, BYTES, stream), 0);
}

/* ---- order ---- */

static void test_copies_are_late(void) {
    begin();
    uintptr_t stream = stream_new(), memory = alloc(BYTES);
    copy_in(memory, slot, stream);
    CHECK(all((void *)memory, BYTES, FAKE_FRESH));
    memset(slot, 9, BYTES); /* the slot used again too early */
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 0);
    CHECK(all((void *)memory, BYTES, 9));
    CHECK_EQ(FAKE(fake_copied_bytes)(), BYTES);
    end(0);
}

static void test_only_what_must_runs(void) {
    begin();
    uintptr_t a = stream_new(), b = stream_new(), event = event_new();
    uintptr_t first = alloc(BYTES), second = alloc(BYTES), third = alloc(BYTES);
    copy_in(first, slot, a);
    CHECK_EQ(FAKE(cuEventRecord)(event, a), 0);
    copy_in(second, slot, a); /* after the record */
    copy_in(third, slot, b);
    CHECK_EQ(FAKE(cuEventSynchronize)(event), 0);
    CHECK(all((void *)first, BYTES, 1));
    CHECK(all((void *)second, BYTES, FAKE_FRESH));
    CHECK(all((void *)third, BYTES, FAKE_FRESH));
    CHECK_EQ(FAKE(fake_pending)(), 2);
    CHECK_EQ(FAKE(cuEventRecord)(event, a), 0);
    CHECK_EQ(FAKE(cuStreamWaitEvent)(b, event, 0), 0);
    CHECK_EQ(FAKE(cuStreamSynchronize)(b), 0); /* takes the other stream's along */
    CHECK(all((void *)second, BYTES, 1));
    CHECK(all((void *)third, BYTES, 1));
    end(0);
}

static void test_wait_captures_its_record(void) {
    begin();
    uintptr_t a = stream_new(), b = stream_new(), event = event_new();
    uintptr_t first = alloc(BYTES), second = alloc(BYTES);
    CHECK_EQ(FAKE(cuStreamWaitEvent)(b, event, 0), 0); /* never recorded: nothing */
    CHECK_EQ(FAKE(cuEventQuery)(event), 0);
    CHECK_EQ(FAKE(cuEventSynchronize)(event), 0);
    copy_in(first, slot, a);
    CHECK_EQ(FAKE(cuStreamWaitEvent)(b, event, 0), 0);
    CHECK_EQ(FAKE(cuStreamSynchronize)(b), 0);
    CHECK(all((void *)first, BYTES, FAKE_FRESH));
    CHECK_EQ(FAKE(cuEventRecord)(event, a), 0);
    CHECK_EQ(FAKE(cuStreamWaitEvent)(b, event, 0), 0);
    copy_in(second, slot, a);
    CHECK_EQ(FAKE(cuEventRecord)(event, a), 0); /* too late for the wait */
    CHECK_EQ(FAKE(cuEventDestroy_v2)(event), 0);
    CHECK_EQ(FAKE(cuStreamSynchronize)(b), 0);
    CHECK(all((void *)first, BYTES, 1));
    CHECK(all((void *)second, BYTES, FAKE_FRESH));
    CHECK_EQ(FAKE(cuStreamDestroy_v2)(a), 0); /* its work goes on */
    FAKE(fake_drain)();
    CHECK(all((void *)second, BYTES, 1));
    end(0);
}

static void test_queries_are_not_ready(void) {
    begin();
    uintptr_t stream = stream_new(), event = event_new(), memory = alloc(BYTES);
    copy_in(alloc(BYTES), slot, stream_new()); /* which no query is about */
    FAKE(fake_query_delay)(3);
    for (int round = 0; round < 2; round++) {
        copy_in(memory, round == 0 ? slot : other_slot, stream);
        CHECK_EQ(FAKE(cuEventRecord)(event, stream), 0);
        for (int i = 0; i < 3; i++) CHECK_EQ(FAKE(cuEventQuery)(event), 600);
        CHECK(!all((void *)memory, BYTES, round + 1));
        CHECK_EQ(FAKE(cuEventQuery)(event), 0);
        CHECK(all((void *)memory, BYTES, round + 1));
        CHECK_EQ(FAKE(fake_pending)(), 1);
    }
    end(0);
}

static void test_random_order_is_legal(void) {
    enum {
        STEPS = 200
    };
    begin();
    uintptr_t streams[2] = {stream_new(), stream_new()}, event = event_new();
    uintptr_t memory = alloc(BYTES);
    FAKE(fake_mode)(FAKE_RANDOM_MODE, 7);
    for (int i = 0; i < STEPS; i++) { /* each copy after the one before, on the other stream */
        CHECK_EQ(FAKE(cuStreamWaitEvent)(streams[i % 2], event, 0), 0);
        copy_in(memory, i % 2 == 0 ? slot : other_slot, streams[i % 2]);
        CHECK_EQ(FAKE(cuEventRecord)(event, streams[i % 2]), 0);
    }
    CHECK_EQ(FAKE(cuEventSynchronize)(event), 0);
    CHECK(all((void *)memory, BYTES, 2));
    copy_in(memory, slot, streams[0]);
    while (FAKE(fake_pending)() > 0) (void)usleep(1000); /* nobody forces it */
    CHECK(all((void *)memory, BYTES, 1));
    end(0);
}

static uintptr_t shared_context;

/* Slots used over and over, as the engine does it: right with the waits in place. */
static void *copy_often(void *unused) {
    enum {
        ROUNDS = 40,
        SLOTS = 3
    };
    uintptr_t events[SLOTS], memory[SLOTS], popped;
    unsigned char *slots = calloc(SLOTS, BYTES);
    (void)unused;
    MUST(slots != NULL && FAKE(cuCtxPushCurrent_v2)(shared_context) == 0);
    MUST(FAKE(cuMemHostRegister_v2)(slots, SLOTS * BYTES, 0) == 0);
    uintptr_t stream = stream_new();
    for (int i = 0; i < SLOTS; i++) events[i] = event_new(), memory[i] = alloc(BYTES);
    for (int i = 0; i < ROUNDS; i++) {
        unsigned char *own = slots + i % SLOTS * BYTES;
        int code;
        while ((code = FAKE(cuEventQuery)(events[i % SLOTS])) == 600) (void)usleep(10);
        CHECK_EQ(code, 0);
        if (i >= SLOTS) CHECK(all((void *)memory[i % SLOTS], BYTES, i - SLOTS));
        memset(own, i, BYTES);
        copy_in(memory[i % SLOTS], own, stream);
        CHECK_EQ(FAKE(cuEventRecord)(events[i % SLOTS], stream), 0);
    }
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 0);
    for (int i = 0; i < SLOTS; i++) {
        CHECK_EQ(FAKE(cuMemFree_v2)(memory[i]), 0);
        CHECK_EQ(FAKE(cuEventDestroy_v2)(events[i]), 0);
    }
    CHECK_EQ(FAKE(cuStreamDestroy_v2)(stream), 0);
    CHECK_EQ(FAKE(cuMemHostUnregister)(slots), 0);
    CHECK(FAKE(cuCtxPopCurrent_v2)(&popped) == 0 && popped == shared_context);
    free(slots);
    return NULL;
}

static void test_many_threads(void) {
    for (int mode = FAKE_LATE_MODE; mode <= FAKE_RANDOM_MODE; mode++) {
        pthread_t threads[4];
        begin();
        CHECK_EQ(FAKE(cuCtxGetCurrent)(&shared_context), 0);
        FAKE(fake_mode)(mode, 11);
        for (int i = 0; i < 4; i++) MUST(pthread_create(&threads[i], NULL, copy_often, NULL) == 0);
        for (int i = 0; i < 4; i++) MUST(pthread_join(threads[i], NULL) == 0);
        end(0);
    }
}

static void test_null_stream(void) {
    begin();
    uintptr_t memory = alloc(BYTES);
    copy_in(memory, slot, 0);
    CHECK(all((void *)memory, BYTES, FAKE_FRESH));
    CHECK_EQ(FAKE(cuStreamSynchronize)(0), 0);
    CHECK(all((void *)memory, BYTES, 1));
    BITES((void)FAKE(cuStreamCreate)(&memory, 0)); /* would wait for it */
    end(1);
}

/* ---- contexts ---- */

static void *without_context(void *unused) {
    uintptr_t stream = 0;
    (void)unused;
    CHECK_EQ(FAKE(fake_current_depth)(), 0);
    CHECK_EQ(FAKE(cuStreamCreate)(&stream, NON_BLOCKING), 201);
    return NULL;
}

static void test_contexts(void) {
    uintptr_t context = 0, second = 0, now = 0;
    FAKE(fake_reset)();
    FAKE(fake_devices)(2);
    CHECK_EQ(FAKE(cuDevicePrimaryCtxRetain)(&context, 0), 3); /* no cuInit */
    CHECK_EQ(FAKE(cuInit)(0), 0);
    CHECK_EQ(FAKE(cuMemAlloc_v2)(&now, BYTES), 201);
    CHECK_EQ(FAKE(cuDevicePrimaryCtxRetain)(&context, 2), 101);
    CHECK_EQ(FAKE(cuDevicePrimaryCtxRetain)(&context, 0), 0);
    CHECK_EQ(FAKE(cuDevicePrimaryCtxRetain)(&second, 1), 0);
    CHECK_EQ(FAKE(cuCtxPushCurrent_v2)(context), 0);
    uintptr_t stream = stream_new(), event = event_new(), memory = alloc(BYTES);
    pthread_t thread;
    MUST(pthread_create(&thread, NULL, without_context, NULL) == 0);
    MUST(pthread_join(thread, NULL) == 0);
    CHECK_EQ(FAKE(cuCtxPushCurrent_v2)(second), 0);
    CHECK_EQ(FAKE(fake_current_depth)(), 2);
    uintptr_t own = stream_new(), own_memory = alloc(BYTES);
    BITES(CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 400));
    BITES(CHECK_EQ(FAKE(cuEventQuery)(event), 400));
    BITES(CHECK_EQ(FAKE(cuMemFree_v2)(memory), 400));
    BITES(CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)(memory, slot, BYTES, own), 400));
    CHECK_EQ(FAKE(cuMemFree_v2)(own_memory), 0);
    CHECK_EQ(FAKE(cuStreamDestroy_v2)(own), 0);
    BITES(CHECK_EQ(FAKE(cuStreamDestroy_v2)(own), 400));
    CHECK_EQ(FAKE(cuDevicePrimaryCtxRelease_v2)(1), 0);
    BITES(CHECK_EQ(FAKE(cuEventCreate)(&event, 0), 201)); /* current, but gone */
    CHECK_EQ(FAKE(cuCtxPopCurrent_v2)(&now), 0);
    CHECK(now == second);
    CHECK(FAKE(cuCtxGetCurrent)(&now) == 0 && now == context);
    BITES((void)FAKE(cuDevicePrimaryCtxRelease_v2)(0)); /* with a stream and an event */
    BITES(CHECK_EQ(FAKE(cuDevicePrimaryCtxRelease_v2)(0), 201));
    CHECK_EQ(FAKE(cuCtxPopCurrent_v2)(NULL), 0);
    CHECK_EQ(FAKE(cuCtxPopCurrent_v2)(NULL), 201);
    BITES(CHECK_EQ(FAKE(cuCtxPushCurrent_v2)(second), 201));
    end(9);
}

static void test_devices(void) {
    char id[16];
    int n = -1;
    FAKE(fake_reset)();
    FAKE(fake_devices)(0);
    CHECK_EQ(FAKE(cuInit)(0), 100);
    CHECK_EQ(FAKE(hipGetDeviceCount)(&n), 100);
    FAKE(fake_devices)(3);
    CHECK_EQ(FAKE(cuInit)(0), 0);
    CHECK(FAKE(cuDeviceGetCount)(&n) == 0 && n == 3);
    CHECK(FAKE(cuDeviceGet)(&n, 2) == 0 && n == 2);
    CHECK_EQ(FAKE(cuDeviceGet)(&n, 3), 101);
    CHECK_EQ(FAKE(cuDeviceGetPCIBusId)(id, sizeof id, 2), 0);
    CHECK(strcmp(id, "0000:03:00.0") == 0);
    CHECK(FAKE(cuDriverGetVersion)(&n) == 0 && n >= 11000);
    end(0);
}

/* ---- memory ---- */

static void test_freed_memory_is_watched(void) {
    begin();
    uintptr_t stream = stream_new(), memory = alloc(BYTES);
    CHECK_EQ(FAKE(cuMemFree_v2)(memory), 0);
    CHECK(all((void *)memory, BYTES, FAKE_FREED));
    BITES(CHECK_EQ(FAKE(cuMemFree_v2)(memory), 1));
    BITES(CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)(memory, slot, BYTES, stream), 1));
    BITES(((unsigned char *)memory)[BYTES / 2] = 0);
    memory = alloc(BYTES);
    BITES(CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)(memory + 1, slot, BYTES, stream), 1));
    copy_in(memory, slot, stream);
    BITES(CHECK_EQ(FAKE(cuMemFree_v2)(memory), 0)); /* a copy is pending */
    FAKE(fake_drain)();
    end(5);
}

static void test_memory_is_finite(void) {
    size_t free_bytes, total;
    uintptr_t memory;
    begin();
    FAKE(fake_device_bytes)(4 * BYTES);
    memory = alloc(BYTES);
    CHECK_EQ(FAKE(cuMemGetInfo_v2)(&free_bytes, &total), 0);
    CHECK(free_bytes == 3 * BYTES && total == 4 * BYTES);
    CHECK_EQ(FAKE(cuMemAlloc_v2)(&memory, 4 * BYTES), 2);
    end(0);
}

static void test_registration(void) {
    begin();
    uintptr_t stream = stream_new(), memory = alloc(BYTES);
    unsigned char *pageable = calloc(1, BYTES);
    MUST(pageable != NULL);
    CHECK_EQ(FAKE(cuMemHostRegister_v2)(slot + 100, 1, 0), 712);
    CHECK_EQ(FAKE(cuMemHostUnregister)(slot), 0);
    BITES(CHECK_EQ(FAKE(cuMemHostUnregister)(slot), 713));
    copy_in(memory, pageable, stream);
    CHECK_EQ(FAKE(fake_pageable_copies)(), 1);
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 0);
    free(pageable);
    copy_in(memory, other_slot, stream);
    BITES(CHECK_EQ(FAKE(cuMemHostUnregister)(other_slot), 0)); /* while it is read from */
    CHECK_EQ(FAKE(cuMemHostRegister_v2)(slot, BYTES / 2, 0), 0);
    BITES(CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)(memory, slot, BYTES, stream), 1));
    CHECK_EQ(FAKE(cuMemHostUnregister)(slot), 0);
    FAKE(fake_refuse_pin)(FAKE(fake_calls)("cuMemHostRegister_v2") + 2, 1);
    CHECK_EQ(FAKE(cuMemHostRegister_v2)(slot, BYTES, 0), 0);
    CHECK_EQ(FAKE(cuMemHostRegister_v2)(other_slot, BYTES, 0), 2);
    CHECK_EQ(FAKE(cuMemHostRegister_v2)(other_slot, BYTES, 0), 0);
    end(3);
}

static void test_copies_out_and_on(void) {
    begin();
    uintptr_t stream = stream_new(), memory = alloc(BYTES), moved = alloc(BYTES);
    copy_in(memory, slot, stream);
    CHECK_EQ(FAKE(cuMemcpyDtoDAsync_v2)(moved, memory, BYTES, stream), 0);
    CHECK_EQ(FAKE(cuMemcpyDtoHAsync_v2)(other_slot, moved, BYTES, stream), 0);
    CHECK(all(other_slot, BYTES, 2));
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 0);
    CHECK(all(other_slot, BYTES, 1));
    end(0);
}

/* ---- blocks of the allocator ---- */

static dl_managed *block_new(uint64_t bytes, uintptr_t stream) {
    void *managed = NULL;
    MUST(FAKE(fake_block)(bytes, 0, stream, &managed) == 0);
    return managed;
}

static void *delete_block(void *managed) {
    ((dl_managed *)managed)->deleter(managed);
    return NULL;
}

static void test_blocks_have_work_pending(void) {
    begin();
    uintptr_t stream = stream_new(), theirs = FAKE(fake_stream)(0), event = event_new();
    dl_managed *block = block_new(BYTES, theirs);
    uintptr_t memory = (uintptr_t)block->tensor.data;
    CHECK(block->tensor.ndim == 1 && block->tensor.shape[0] == BYTES);
    CHECK(block->tensor.device.type == DL_CPU && block->tensor.dtype.bits == 8);
    CHECK(memory % 512 == 0 && memory % 4096 != 0);
    copy_in(memory, slot, stream);
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 0);
    CHECK(all((void *)memory, BYTES, 1));
    FAKE(fake_drain)();
    CHECK(all((void *)memory, BYTES, FAKE_LATE)); /* did not wait */
    block->deleter(block);
    CHECK(all((void *)memory, BYTES, FAKE_FREED));
    block = block_new(BYTES, theirs);
    memory = (uintptr_t)block->tensor.data;
    CHECK_EQ(FAKE(cuEventRecord)(event, theirs), 0);
    CHECK_EQ(FAKE(cuStreamWaitEvent)(stream, event, 0), 0);
    copy_in(memory, slot, stream);
    FAKE(fake_drain)();
    CHECK(all((void *)memory, BYTES, 1)); /* waited */
    pthread_t thread;
    MUST(pthread_create(&thread, NULL, delete_block, block) == 0);
    MUST(pthread_join(thread, NULL) == 0);
    end(0);
}

static void test_blocks_freed_too_early(void) {
    begin();
    uintptr_t stream = stream_new(), theirs = FAKE(fake_stream)(0);
    dl_managed *block = block_new(BYTES, theirs);
    copy_in((uintptr_t)block->tensor.data, slot, stream);
    BITES(block->deleter(block));
    block = block_new(BYTES, theirs);
    copy_in((uintptr_t)block->tensor.data, slot, theirs); /* its own stream's order is enough */
    block->deleter(block);
    FAKE(fake_drain)();
    end(1);
}

static void test_blocks_are_reused(void) {
    begin();
    uintptr_t theirs = FAKE(fake_stream)(0);
    dl_managed *block = block_new(BYTES, theirs), *next;
    void *memory = block->tensor.data;
    block->deleter(block);
    next = block_new(BYTES, theirs);
    CHECK(next->tensor.data != memory); /* quarantined */
    FAKE(fake_quarantine)(0);
    memory = next->tensor.data;
    next->deleter(next);
    block = block_new(BYTES / 2, theirs);
    CHECK(block->tensor.data == memory);
    FAKE(fake_drain)();
    CHECK(all(memory, BYTES / 2, FAKE_LATE));
    end(0);
    CHECK(all(memory, BYTES / 2, FAKE_LATE)); /* lives on after the reset in end() */
    block->deleter(block);
}

static void test_noted_memory(void) {
    begin();
    uintptr_t stream = stream_new(), theirs = FAKE(fake_stream)(0);
    unsigned char *memory = calloc(1, BYTES);
    MUST(memory != NULL);
    CHECK_EQ(FAKE(fake_note)(memory, BYTES, 0, theirs), 0);
    copy_in((uintptr_t)memory, slot, stream);
    FAKE(fake_drain)();
    CHECK(all(memory, BYTES, FAKE_LATE));
    CHECK_EQ(FAKE(fake_forget)(memory), 0);
    CHECK_EQ(FAKE(fake_forget)(memory), 1);
    BITES(CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)((uintptr_t)memory, slot, BYTES, stream), 1));
    free(memory);
    end(1);
}

/* ---- failures ---- */

static void test_faults(void) {
    const char *name = NULL;
    begin();
    uintptr_t stream = stream_new();
    CHECK_EQ(FAKE(fake_fail)("cuNothing", 1, 1, 1), -1);
    CHECK_EQ(FAKE(fake_fail)("cuStreamSynchronize", 2, 2, 700), 0);
    const int expected[] = {0, 700, 700, 0};
    for (int i = 0; i < 4; i++) CHECK_EQ(FAKE(cuStreamSynchronize)(stream), expected[i]);
    CHECK_EQ(FAKE(fake_calls)("cuStreamSynchronize"), 4);
    CHECK(FAKE(cuGetErrorName)(700, &name) == 0 && strcmp(name, "CUDA_ERROR_ILLEGAL_ADDRESS") == 0);
    CHECK_EQ(FAKE(cuGetErrorName)(12345, &name), 1);
    end(0);
}

static void test_lost_device(void) {
    const char *text = NULL;
    begin();
    uintptr_t stream = stream_new(), memory = alloc(BYTES);
    copy_in(memory, slot, stream);
    CHECK_EQ(FAKE(fake_fail)("cuMemcpyHtoDAsync_v2", 2, 0, 719), 0);
    CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)(memory, slot, BYTES, stream), 719);
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 719);
    CHECK_EQ(FAKE(cuMemFree_v2)(memory), 719);
    CHECK_EQ(FAKE(hipInit)(0), 719);
    CHECK_EQ(FAKE(cuFileDriverOpen)().cuda_error, 719);
    CHECK_EQ(FAKE(cuGetErrorString)(719, &text), 0);
    CHECK_EQ(FAKE(fake_pending)(), 0);
    CHECK(all((void *)memory, BYTES, FAKE_FRESH));
    FAKE(fake_clear)();
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 0); /* a new life */
    end(0);
}

static void test_forked_child(void) {
    begin();
    pid_t child = fork();
    if (child == 0) _exit(FAKE(cuInit)(0) == 3 && FAKE(fake_violations)() == 1 ? 0 : 1);
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    CHECK_EQ(FAKE(cuInit)(0), 0);
    end(0);
}

/* ---- the rest ---- */

static void test_free_copies(void) {
    begin();
    uintptr_t stream = stream_new(), event = event_new(), memory = alloc(BYTES);
    FAKE(fake_free_copies)(1);
    copy_in(memory, slot, stream);
    CHECK_EQ(FAKE(cuEventRecord)(event, stream), 0);
    CHECK_EQ(FAKE(cuEventQuery)(event), 0);
    CHECK(all((void *)memory, BYTES, FAKE_FRESH));
    CHECK_EQ(FAKE(fake_copied_bytes)(), BYTES);
    end(0);
}

static void test_live_counts(void) {
    fake_counts live;
    begin();
    uintptr_t stream = stream_new(), event = event_new(), memory = alloc(BYTES);
    dl_managed *block = block_new(BYTES, FAKE(fake_stream)(0));
    FAKE(fake_live)(&live);
    CHECK(live.contexts == 1 && live.streams == 1 && live.events == 1 && live.ranges == 2);
    CHECK(live.range_bytes == 2 * BYTES && live.blocks == 2 && live.block_bytes == 2 * BYTES);
    block->deleter(block);
    CHECK_EQ(FAKE(cuEventDestroy_v2)(event), 0);
    CHECK_EQ(FAKE(cuStreamDestroy_v2)(stream), 0);
    CHECK_EQ(FAKE(cuMemFree_v2)(memory), 0);
    FAKE(fake_clear)();
    FAKE(fake_live)(&live);
    CHECK(live.contexts == 1 && live.streams == 0 && live.events == 0 && live.blocks == 0);
    CHECK_EQ(FAKE(fake_current_depth)(), 1);
    end(0);
}

static void test_hip(void) {
    uintptr_t stream = 0, memory = 0, event = 0;
    int device = -1;
    FAKE(fake_reset)();
    FAKE(fake_devices)(2);
    memset(slot, 1, sizeof slot);
    CHECK_EQ(FAKE(hipInit)(0), 0);
    CHECK_EQ(FAKE(hipSetDevice)(2), 101);
    CHECK_EQ(FAKE(hipSetDevice)(1), 0);
    CHECK(FAKE(hipGetDevice)(&device) == 0 && device == 1);
    CHECK_EQ(FAKE(hipStreamCreateWithFlags)(&stream, NON_BLOCKING), 0);
    CHECK_EQ(FAKE(hipEventCreateWithFlags)(&event, 2), 0);
    CHECK_EQ(FAKE(hipMalloc)(&memory, BYTES), 0);
    CHECK_EQ(FAKE(hipMemcpyHtoDAsync)(memory, slot, BYTES, stream), 0);
    CHECK_EQ(FAKE(hipEventRecord)(event, stream), 0);
    CHECK_EQ(FAKE(hipEventQuery)(event), 600);
    CHECK_EQ(FAKE(hipEventSynchronize)(event), 0);
    CHECK(all((void *)memory, BYTES, 1));
    CHECK_EQ(FAKE(hipSetDevice)(0), 0);
    BITES(CHECK_EQ(FAKE(hipStreamSynchronize)(stream), 400));
    CHECK(strcmp(FAKE(hipGetErrorString)(1), "invalid argument") == 0);
    end(1);
}

static void test_cufile(void) {
    void *handle = NULL;
    test_file made = test_create(2 * BYTES + 100, 3);
    begin();
    uintptr_t memory = alloc(1 << 20);
    fake_file_descriptor file = {.type = 1, .handle.fd = open(made.path, O_RDONLY | O_CLOEXEC)};
    MUST(file.handle.fd >= 0);
    CHECK_EQ(FAKE(cuFileHandleRegister)(&handle, &file).error, 5001);
    CHECK_EQ(FAKE(cuFileDriverOpen)().error, 0);
    CHECK_EQ(FAKE(cuFileHandleRegister)(&handle, &file).error, 0);
    CHECK_EQ(FAKE(cuFileBufRegister)((void *)memory, 1 << 20, 0).error, 0);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, BYTES, 4096), BYTES);
    for (uint64_t i = 0; i < BYTES; i++)
        if (!CHECK_EQ(((unsigned char *)memory)[4096 + i], test_byte(BYTES + i, 3))) break;
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, 3 * BYTES, 0, 0), 2 * BYTES + 100);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 0, 512), -5022);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 512, 0), -5022);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, 512, 0, 0), -5022);
    BITES(CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 0, 1 << 20), -5012));
    CHECK_EQ(FAKE(fake_fail)("cuFileRead", FAKE(fake_calls)("cuFileRead") + 1, 1, EIO), 0);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 0, 0), -1);
    BITES((void)FAKE(cuMemFree_v2)(memory)); /* still registered */
    CHECK_EQ(FAKE(cuFileBufDeregister)((void *)memory).error, 0);
    (void)close(file.handle.fd);
    BITES(FAKE(cuFileHandleDeregister)(handle)); /* after its descriptor is gone */
    CHECK_EQ(FAKE(cuFileDriverClose)().error, 0);
    end(3);
    test_remove(&made);
}

static void test_cufile_closes_stdin(void) {
    begin();
    int saved = dup(STDIN_FILENO);
    int before = saved >= 0 ? saved : open("/dev/null", O_RDONLY);
    MUST(dup2(before, STDIN_FILENO) == STDIN_FILENO);
    FAKE(fake_close_stdin)(1);
    CHECK_EQ(FAKE(cuFileDriverOpen)().error, 0);
    CHECK(fcntl(STDIN_FILENO, F_GETFD) < 0);
    MUST(dup2(before, STDIN_FILENO) == STDIN_FILENO);
    (void)close(before);
    end(0);
}

int main(void) {
    FAKE(fake_reset)(); /* opened before descriptors are counted */
    RUN(test_copies_are_late);
    RUN(test_only_what_must_runs);
    RUN(test_wait_captures_its_record);
    RUN(test_queries_are_not_ready);
    RUN(test_random_order_is_legal);
    RUN(test_many_threads);
    RUN(test_null_stream);
    RUN(test_contexts);
    RUN(test_devices);
    RUN(test_freed_memory_is_watched);
    RUN(test_memory_is_finite);
    RUN(test_registration);
    RUN(test_copies_out_and_on);
    RUN(test_blocks_have_work_pending);
    RUN(test_blocks_freed_too_early);
    RUN(test_blocks_are_reused);
    RUN(test_noted_memory);
    RUN(test_faults);
    RUN(test_lost_device);
    RUN(test_forked_child);
    RUN(test_free_copies);
    RUN(test_live_counts);
    RUN(test_hip);
    RUN(test_cufile);
    RUN(test_cufile_closes_stdin);
    return test_result();
}
