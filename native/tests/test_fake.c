/* test_fake.c - the fake device driver does the harm it promises. */
#include "fake.h"

#include <pthread.h>
#include <sys/wait.h>

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

static void test_memory_of_the_driver(void) {
    void *mine = NULL;
    begin();
    uintptr_t stream = stream_new(), memory = alloc(BYTES);
    CHECK_EQ(FAKE(cuMemHostAlloc)(&mine, BYTES, 1), 0);
    CHECK(all(mine, BYTES, FAKE_FRESH));
    copy_in(memory, mine, stream);
    CHECK_EQ(FAKE(fake_pageable_copies)(), 0);
    BITES(CHECK_EQ(FAKE(cuMemFreeHost)(mine), 0)); /* while it is read from */
    BITES(CHECK_EQ(FAKE(cuMemFreeHost)(mine), 1));
    BITES(CHECK_EQ(FAKE(cuMemFreeHost)(slot), 1));
    CHECK_EQ(FAKE(cuMemHostAlloc)(&mine, BYTES, 1), 0);
    BITES(CHECK_EQ(FAKE(cuMemHostUnregister)(mine), 713));
    end(4);
}

static void test_kinds_of_memory(void) {
    int value = -1;
    begin();
    uintptr_t stream = stream_new(), memory = alloc(BYTES);
    CHECK(FAKE(cuDeviceGetAttribute)(&value, 18, 0) == 0 && value == 0);
    FAKE(fake_unified)(1, 1);
    CHECK(FAKE(cuDeviceGetAttribute)(&value, 18, 0) == 0 && value == 1);
    CHECK(FAKE(cuDeviceGetAttribute)(&value, 100, 0) == 0 && value == 1);
    CHECK(FAKE(hipDeviceGetAttribute)(&value, 16, 0) == 0 && value == 1);
    CHECK_EQ(FAKE(cuDeviceGetAttribute)(&value, 17, 0), 1);
    CHECK_EQ(FAKE(cuDeviceGetAttribute)(&value, 18, 1), 101);
    CHECK_EQ(FAKE(cuMemHostUnregister)(slot), 0);
    CHECK_EQ(FAKE(cuMemHostRegister_v2)(slot, BYTES, 0), 0); /* pins nothing now */
    copy_in(memory, slot, stream);
    CHECK_EQ(FAKE(fake_pageable_copies)(), 1);
    FAKE(fake_drain)();
    end(0);
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

/* A call that may void another thread's capture is reported, and has no effect. */
static void test_captures(void) {
    begin();
    int mode = 2;
    uintptr_t stream = stream_new(), event = event_new(), memory = alloc(BYTES);
    FAKE(fake_capture)(1);
    copy_in(memory, slot, stream);
    CHECK_EQ(FAKE(cuEventRecord)(event, stream), 0);
    BITES(CHECK_EQ(FAKE(cuEventQuery)(event), 900));
    BITES(CHECK_EQ(FAKE(cuMemHostUnregister)(slot), 900));
    CHECK_EQ(FAKE(cuThreadExchangeStreamCaptureMode)(&mode), 0);
    CHECK_EQ(mode, 0);
    CHECK_EQ(FAKE(cuEventQuery)(event), 600);
    CHECK_EQ(FAKE(cuThreadExchangeStreamCaptureMode)(&mode), 0);
    CHECK_EQ(mode, 2);
    BITES(CHECK_EQ(FAKE(cuEventSynchronize)(event), 900));
    FAKE(fake_capture)(0);
    CHECK_EQ(FAKE(cuEventSynchronize)(event), 0);
    mode = 3;
    CHECK_EQ(FAKE(cuThreadExchangeStreamCaptureMode)(&mode), 1);
    end(3);
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
    RUN(test_memory_of_the_driver);
    RUN(test_kinds_of_memory);
    RUN(test_copies_out_and_on);
    RUN(test_faults);
    RUN(test_lost_device);
    RUN(test_forked_child);
    RUN(test_free_copies);
    RUN(test_hip);
    RUN(test_captures);
    return test_result();
}
