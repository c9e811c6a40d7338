/* test_device_ring.c - pinned slots stay within their limit and serve the next load; devices
 * open or say why not; and no call changes the caller's context.
 */
#include "device.h"

#include <time.h>

enum {
    CHUNKS = 12,
    BYTES = CHUNKS * SLOT_BYTES
};

static test_file made;
static bool uploading; /* from memory, in place of the file */

static bool host_page_tables;

static void clear(void) {
    FAKE(fake_clear)();
    FAKE(fake_unified)(0, host_page_tables);
}

static uint64_t registered(void) {
    return FAKE(fake_calls)(device_kind == FST_GPU_CUDA ? "cuMemHostRegister_v2"
                                                        : "hipHostRegister");
}

static uint64_t allocated(void) { return FAKE(fake_calls)("cuMemHostAlloc"); }

static uint64_t pins(void) { return registered() + allocated(); }

static uint64_t pinned(void) {
    fake_counts now;
    fst_pool_stats stats;
    FAKE(fake_live)(&now);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.pinned_bytes, now.range_bytes);
    return now.range_bytes;
}

static void load(int ordinal, uint64_t chunk, uint64_t limit, int threads) {
    fst_job_stats stats;
    fst_job_options options = options_to(ordinal, FST_READ_BUFFERED);
    options.chunk_bytes = chunk;
    options.pinned_bytes = limit;
    options.threads = threads;
    device_load l = {.made = made, .upload = uploading};
    CHECK_EQ(device_run_once(&l, &options, &stats), FST_OK);
}

/* ---- the ring ---- */

static void test_limits(void) {
    for (uint64_t slots = 0; slots <= 3; slots++) {
        for (int threads = 1; threads <= 4; threads++) {
            uint64_t limit = slots * SLOT_BYTES + 4095; /* which buys nothing */
            load(0, SLOT_BYTES, limit, threads);
            CHECK(pinned() <= limit);
            CHECK_EQ(pinned() > 0, slots > 0);
        }
        CHECK_EQ(FAKE(fake_pageable_copies)() > 0, slots == 0);
        fst_pool_shutdown();
        CHECK_EQ(pinned(), 0);
        clear();
    }
}

static void test_reuse(void) {
    fst_pool_stats before, after;
    load(0, SLOT_BYTES, SLOT_BYTES, 2);
    CHECK_EQ(pins(), 1);
    fst_pool_get_stats(&before);
    CHECK(before.pinned_nanoseconds > 0);
    for (int ordinal = 0; ordinal < DEVICES; ordinal++) load(ordinal, SLOT_BYTES, SLOT_BYTES, 2);
    CHECK_EQ(pins(), 1); /* through any device */
    load(0, SLOT_BYTES, 0, 1);
    CHECK_EQ(pins(), 1); /* what is pinned may be used */
    fst_pool_get_stats(&after);
    CHECK_EQ(after.pinned_nanoseconds, before.pinned_nanoseconds);
    CHECK_EQ(FAKE(fake_pageable_copies)(), 0);
}

static void test_refused(void) {
    for (uint64_t first = 1; first <= 3; first++) {
        FAKE(fake_refuse_pin)(first, UINT64_MAX);
        load(0, SLOT_BYTES, NO_LIMIT, 4);
        CHECK(pinned() <= (first - 1) * SLOT_BYTES);
        CHECK_EQ(FAKE(fake_pageable_copies)() > 0, first == 1);
        uint64_t tried = pins();
        load(0, SLOT_BYTES, NO_LIMIT, 4);
        if (tried >= first) CHECK_EQ(pins(), tried); /* not asked again at every chunk */
        FAKE(fake_refuse_pin)(0, 0);
        fst_pool_shutdown();
        load(0, SLOT_BYTES, NO_LIMIT, 4); /* but after the ring was cleared */
        CHECK(pins() > tried);
        fst_pool_shutdown();
        clear();
    }
}

static double seconds(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Slots that are too small make room, without anybody's waiting for them. */
static void test_growing_chunks(void) {
    uint64_t limit = 8 * SLOT_BYTES;
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 50 && pinned() < limit; i++) load(0, SLOT_BYTES, limit, 8);
        double begin = seconds();
        load(0, limit, limit, 2);
        CHECK(seconds() - begin < 3);
        CHECK_EQ(pinned(), limit);
        load(0, SLOT_BYTES, limit, 2); /* in a slot larger than needed */
        CHECK_EQ(pinned(), limit);
        fst_pool_shutdown();
    }
}

static void test_uploads(void) {
    uploading = true;
    test_limits();
    test_refused();
    clear();
    test_reuse();
    uploading = false;
}

/* Where CUDA's registering pins nothing, the driver allocates the slots. */
static void test_host_page_tables(void) {
    bool cuda = device_kind == FST_GPU_CUDA;
    host_page_tables = true;
    clear();
    test_limits();
    test_refused();
    clear();
    test_reuse();
    CHECK_EQ(allocated(), cuda);
    CHECK_EQ(registered(), !cuda);
    fst_pool_shutdown();
    CHECK_EQ(pinned(), 0);
    CHECK_EQ(FAKE(fake_calls)("cuMemFreeHost"), cuda);
    host_page_tables = false;
}

/* What CUDA pinned is of no use to HIP. */
static void test_other_driver(void) {
    int kind = device_kind;
    for (int i = 0; i < 4; i++) {
        load(0, SLOT_BYTES, SLOT_BYTES, 2);
        CHECK_EQ(pinned(), SLOT_BYTES);
        device_kind = device_kind == FST_GPU_CUDA ? FST_GPU_HIP : FST_GPU_CUDA;
        device_open_all();
    }
    device_kind = kind;
}

/* ---- opening ---- */

static void check_not_opened(int kind, const char *library, int ordinal, int code) {
    fst_device *device = device_at(0);
    fst_error err = {0};
    CHECK_EQ(fst_device_open(kind, library, ordinal, &device, &err), code);
    CHECK(device == NULL && err.code == code && err.message[0] != '\0');
}

static void test_devices_open(void) {
    fst_device *again = NULL;
    fst_error err = {0};
    fst_device_info info;
    CHECK_EQ(fst_device_open(device_kind, fake_path(), 1, &again, &err), FST_OK);
    CHECK(again == device_at(1));
    CHECK_EQ(fst_device_get_info(again, &info, &err), FST_OK);
    CHECK(info.kind == device_kind && info.ordinal == 1 && info.streams > 0);
    CHECK(info.total_bytes >= info.free_bytes && info.free_bytes > 0);
    check_not_opened(7, NULL, 0, FST_E_INVALID);
    check_not_opened(device_kind, fake_path(), DEVICES, FST_E_DEVICE);
    check_not_opened(device_kind, fake_path(), -1, FST_E_DEVICE);
    check_not_opened(device_kind, "/nowhere/libcuda.so.1", 0, FST_E_DEVICE);
    check_not_opened(device_kind, "libdl.so.2", 0, FST_E_DEVICE); /* has no such functions */
}

/* Where the driver does not know the question, the answer is no. */
static void test_kinds_of_memory(void) {
    fst_device_info info;
    fst_error err = {0};
    const char *asks =
        device_kind == FST_GPU_CUDA ? "cuDeviceGetAttribute" : "hipDeviceGetAttribute";
    for (int kind = 0; kind < 4; kind++) {
        FAKE(fake_unified)(kind & 1, kind >> 1);
        CHECK_EQ(fst_device_get_info(device_at(0), &info, &err), FST_OK);
        CHECK(info.integrated == (kind & 1) && info.host_page_tables == kind >> 1);
    }
    CHECK_EQ(FAKE(fake_fail)(asks, 1, UINT64_MAX, 1), 0);
    CHECK_EQ(fst_device_get_info(device_at(0), &info, &err), FST_OK);
    CHECK(info.integrated == 0 && info.host_page_tables == 0);
    load(0, SLOT_BYTES, SLOT_BYTES, 2);
    CHECK_EQ(registered(), 1);
}

/* A driver under another name is another driver: its first device initialises it. */
static void test_open_fails(void) {
    static const char *const calls[2][6] = {
        {"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain"},
        {"hipInit", "hipGetDeviceCount"}};
    char other[4096];
    int length =
        snprintf(other, sizeof other, "%.*s/./%s", (int)(strrchr(fake_path(), '/') - fake_path()),
                 fake_path(), strrchr(fake_path(), '/') + 1);
    MUST(length > 0 && (size_t)length < sizeof other);
    for (int i = 0; calls[device_kind][i] != NULL; i++) {
        CHECK_EQ(FAKE(fake_fail)(calls[device_kind][i], 1, 1, 999), 0);
        check_not_opened(device_kind, other, 0, FST_E_DEVICE);
        FAKE(fake_clear)();
    }
}

/* ---- the caller's context ---- */

static void check_context(int depth, uintptr_t context) {
    uintptr_t now = 0;
    int ordinal = -1;
    if (device_kind == FST_GPU_HIP) {
        CHECK(FAKE(hipGetDevice)(&ordinal) == 0 && ordinal == (int)context);
        return;
    }
    CHECK_EQ(FAKE(fake_current_depth)(), depth);
    CHECK(FAKE(cuCtxGetCurrent)(&now) == 0 && now == context);
}

/* Every public call that may enter the driver, in the thread of the caller, too. */
static void call_everything(int depth, uintptr_t context) {
#define KEEPS(statement)                                                                           \
    do {                                                                                           \
        statement;                                                                                 \
        check_context(depth, context);                                                             \
    } while (0)
    fst_device *device = NULL;
    fst_device_info info;
    int32_t equal = 0;
    device_load l = {.made = made};
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    KEEPS(CHECK_EQ(fst_device_open(device_kind, fake_path(), 0, &device, &l.err), FST_OK));
    KEEPS(CHECK_EQ(fst_device_get_info(device, &info, &l.err), FST_OK));
    for (int threads = 0; threads < 2; threads++) {
        if (threads == 0) CHECK_EQ(fst_fault_set("pthread_create", 1, INT_MAX, EAGAIN, 0), 0);
        KEEPS(CHECK_EQ(device_start(&l, &options), FST_OK));
        KEEPS((void)fst_job_wait_until(l.job, SLOT_BYTES, 1000, &l.err));
        KEEPS(CHECK_EQ(job_result(l.job, &l.err), FST_OK));
        CHECK(device_right(&l));
        KEEPS(CHECK_EQ(fst_device_compare(device, l.arena, 0, l.file, 0, 999, &equal, &l.err),
                       FST_OK));
        CHECK_EQ(equal, 1);
        KEEPS(CHECK_EQ(fst_device_compare(device, l.arena, 0, l.file, 1, 999, &equal, &l.err),
                       FST_OK));
        CHECK_EQ(equal, 0);
        KEEPS(device_end(&l));
        KEEPS(CHECK_EQ(device_start(&l, &options), FST_OK));
        KEEPS(fst_job_cancel(l.job));
        KEEPS(device_end(&l));
        fst_fault_clear();
    }
    KEEPS(fst_pool_shutdown());
#undef KEEPS
}

static void test_context_is_kept(void) {
    uintptr_t context = 0;
    if (device_kind == FST_GPU_HIP) {
        for (int i = 0; i < DEVICES; i++) {
            MUST(FAKE(hipSetDevice)(i) == 0);
            call_everything(0, (uintptr_t)i);
        }
        MUST(FAKE(hipSetDevice)(0) == 0);
        return;
    }
    call_everything(0, 0); /* a thread that has none */
    MUST(FAKE(cuDevicePrimaryCtxRetain)(&context, 2) == 0);
    MUST(FAKE(cuCtxPushCurrent_v2)(context) == 0);
    call_everything(1, context);
    MUST(FAKE(cuCtxPopCurrent_v2)(NULL) == 0);
    MUST(FAKE(cuDevicePrimaryCtxRelease_v2)(2) == 0);
}

int main(void) {
    made = test_create(BYTES, 3);
    for (device_kind = FST_GPU_CUDA; device_kind <= FST_GPU_HIP; device_kind++) {
        RUN_ON(test_limits);
        RUN_ON(test_reuse);
        RUN_ON(test_refused);
        RUN_ON(test_growing_chunks);
        RUN_ON(test_uploads);
        RUN_ON(test_host_page_tables);
        RUN_ON(test_kinds_of_memory);
        RUN_ON(test_devices_open);
        RUN_ON(test_open_fails);
        RUN_ON(test_context_is_kept);
    }
    device_kind = FST_GPU_CUDA;
    RUN_ON(test_other_driver);
    test_remove(&made);
    return test_result();
}
