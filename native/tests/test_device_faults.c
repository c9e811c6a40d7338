/* test_device_faults.c - whatever fails on the way to a device, the load ends with an error or
 * with the right bytes, nothing is left over, no copy goes astray, and the next load works.
 */
#include "device.h"

enum {
    CHUNKS = 6,
    BYTES = CHUNKS * SLOT_BYTES,
    CALLS_MAX = 400, /* of one function in one go: fewer */
    FAILED = 719,
    ALL = INT_MAX
};

static test_file made;
static bool direct_works;
static bool host_page_tables; /* then the driver allocates the slots */

static fst_job_options small_ring(int threads) {
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    options.threads = threads;
    options.pinned_bytes = 2 * SLOT_BYTES;
    return options;
}

/* ---- a driver's function fails once ---- */

/* Everything that calls the driver, once; the first error ends it. */
static int go(int threads) {
    fst_error err = {0};
    fst_device_info info;
    fst_job_stats stats;
    int32_t equal = 0;
    fst_job_options options = small_ring(threads);
    device_load l = {.made = made};
    FAKE(fake_unified)(0, host_page_tables);
    int code = fst_device_get_info(options.device, &info, &err);
    if (code == FST_OK) code = device_load_once(&made, &options, &stats);
    if (code != FST_OK) return code;
    code = device_start(&l, &options);
    if (code == FST_OK) code = job_result(l.job, &l.err);
    if (code == FST_OK)
        code = fst_device_compare(options.device, l.arena, 10, l.file, 10, 5000, &equal, &err);
    if (code == FST_OK) CHECK_EQ(equal, 1);
    FAKE(fake_drain)();
    device_end(&l);
    fst_pool_shutdown(); /* unpins */
    return code;
}

/* The same of uploads. */
static int go_upload(int threads) {
    fst_job_stats stats;
    fst_job_options options = small_ring(threads);
    FAKE(fake_unified)(0, host_page_tables);
    int code = device_upload_once(&made, &options, &stats);
    FAKE(fake_drain)();
    fst_pool_shutdown();
    return code;
}

static int (*everything)(int threads) = go;

/* The caller's stack may be spoiled only where the call that would have put it right failed. */
static void check_stack(const char *name, bool lost, int before) {
    bool restores = lost || strcmp(name, "cuCtxPopCurrent_v2") == 0;
    CHECK(FAKE(fake_current_depth)() - before <= restores);
    while (FAKE(fake_current_depth)() > before) (void)FAKE(cuCtxPopCurrent_v2)(NULL);
}

/* What unregistering refused is registered still; then, and only then. */
static void check_ranges(const char *name) {
    fake_counts now;
    bool kept = strcmp(name, "cuMemHostUnregister") == 0 || strcmp(name, "cuMemFreeHost") == 0 ||
                strcmp(name, "hipHostUnregister") == 0;
    FAKE(fake_live)(&now);
    CHECK(now.ranges - device_before.ranges <= kept);
    device_before.ranges = now.ranges;
}

/* Returns whether the call was met. */
static bool fail_at(const char *name, uint64_t call, int count, int threads) {
    int before = FAKE(fake_current_depth)();
    CHECK_EQ(FAKE(fake_fail)(name, call, (uint64_t)count, FAILED), 0);
    int code = everything(threads);
    bool met = FAKE(fake_calls)(name) >= call;
    if (!met) CHECK_EQ(code, FST_OK);
    CHECK(code == FST_OK || code == FST_E_DEVICE);
    FAKE(fake_lose_device)(0);
    CHECK_EQ(FAKE(fake_fail)(name, 0, 0, 0), 0);
    fst_pool_shutdown();
    if (!check_violations())
        (void)fprintf(stderr, "    %s, call %d, %d threads\n", name, (int)call, threads);
    check_stack(name, count == 0, before);
    if (count == 1) check_ranges(name);
    FAKE(fake_clear)();
    return met;
}

static const char *const functions[2][16] = {
    {"cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuStreamWaitEvent", "cuStreamSynchronize",
     "cuEventCreate", "cuEventRecord", "cuEventQuery", "cuEventSynchronize", "cuMemHostRegister_v2",
     "cuMemHostUnregister", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemGetInfo_v2"},
    {"hipGetDevice", "hipSetDevice", "hipStreamWaitEvent", "hipStreamSynchronize",
     "hipEventCreateWithFlags", "hipEventRecord", "hipEventQuery", "hipEventSynchronize",
     "hipHostRegister", "hipHostUnregister", "hipMemcpyHtoDAsync", "hipMemcpyDtoHAsync",
     "hipMemGetInfo"},
};

static void test_each_call_fails(void) {
    for (int i = 0; functions[device_kind][i] != NULL; i++)
        for (int threads = 1; threads <= 2; threads++)
            for (uint64_t call = 1; fail_at(functions[device_kind][i], call, 1, threads);
                 call += UNDER_TSAN ? 5 : 1)
                MUST(call < CALLS_MAX);
    CHECK_EQ(everything(2), FST_OK);
}

/* From some call on nothing works; pending copies never run. */
static void test_device_lost(void) {
    for (int i = 0; functions[device_kind][i] != NULL; i++)
        for (uint64_t call = 1; fail_at(functions[device_kind][i], call, 0, 2);
             call += UNDER_TSAN ? 17 : 7) {
        }
    FAKE(fake_live)(&device_before); /* what could not be unregistered */
    CHECK_EQ(everything(2), FST_OK);
}

/* With every fault, in the caller's own thread. */
static void test_without_threads(void) {
    for (int i = 0; functions[device_kind][i] != NULL; i++)
        for (uint64_t call = 1;; call += UNDER_TSAN ? 15 : 3) {
            CHECK_EQ(fst_fault_set("pthread_create", 1, ALL, EAGAIN, 0), 0);
            bool met = fail_at(functions[device_kind][i], call, 1, 2);
            fst_fault_clear();
            if (!met) break;
        }
}

static void test_driver_memory_fails(void) {
    static const char *const names[] = {"cuMemHostAlloc", "cuMemFreeHost", "cuDeviceGetAttribute"};
    host_page_tables = true;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        for (int count = 1; count >= 0; count--)
            for (uint64_t call = 1; fail_at(names[i], call, count, 2); call++)
                MUST(call < CALLS_MAX);
        FAKE(fake_live)(&device_before); /* what a lost device did not free */
    }
    CHECK_EQ(everything(2), FST_OK);
    host_page_tables = false;
}

static void test_uploads_fail(void) {
    everything = go_upload;
    test_each_call_fails();
    test_device_lost();
    test_without_threads();
    everything = go;
}

/* ---- reads fail while copies are in flight ---- */

typedef struct read_fault {
    int mode;
    const char *call;
    uint64_t first, count;
    int sys_errno; /* 0: cut short */
    uint64_t short_bytes;
    int code;
    int direct_errno;
} read_fault;

#define BUFFERED FST_READ_BUFFERED
#define DIRECT FST_READ_DIRECT

static const read_fault read_faults[] = {
    {BUFFERED, "preadv", 3, 1, EIO, 0, FST_E_SYS, 0},
    {BUFFERED, "preadv", 4, 1, 0, 0, FST_E_TRUNCATED, 0},
    {BUFFERED, "preadv", 2, 30, EINTR, 0, FST_OK, 0},
    {BUFFERED, "preadv", 2, 20, EAGAIN, 0, FST_OK, 0},
    {BUFFERED, "preadv", 1, ALL, 0, 4097, FST_OK, 0},
    {DIRECT, "pread", 3, 1, EIO, 0, FST_E_SYS, 0},
    {DIRECT, "pread", 4, 1, 0, 0, FST_E_TRUNCATED, 0},
    {DIRECT, "pread", 2, 30, EINTR, 0, FST_OK, 0},
    {DIRECT, "pread", 1, ALL, 0, 5001, FST_OK, 0},
    {DIRECT, "pread", 1, ALL, EINVAL, 0, FST_OK, EINVAL},
    {DIRECT, "pread", 4, 1, ENOTSUP, 0, FST_OK, ENOTSUP},
    {DIRECT, "pread", 2, 1, EFAULT, 0, FST_OK, EFAULT},
    {BUFFERED, "pthread_create", 1, ALL, EAGAIN, 0, FST_OK, 0},
    {DIRECT, "pthread_create", 1, ALL, EAGAIN, 0, FST_OK, 0},
    {BUFFERED, "pthread_create", 2, ALL, EAGAIN, 0, FST_OK, 0},
    {BUFFERED, "mmap", 1, ALL, ENOMEM, 0, FST_E_NOMEM, 0}, /* no slot */
    {BUFFERED, "mmap", 2, ALL, ENOMEM, 0, FST_OK, 0},      /* one slot */
    {BUFFERED, "madvise", 1, ALL, EINVAL, 0, FST_OK, 0},   /* none may be pinned */
};

static void test_reads_fail(void) {
    for (size_t i = 0; i < sizeof read_faults / sizeof *read_faults; i++) {
        const read_fault *f = &read_faults[i];
        if (f->mode == DIRECT && !direct_works) continue;
        for (int threads = 1; threads <= 3; threads++) {
            fst_job_stats stats = {0};
            fst_job_options options = options_to(0, f->mode);
            options.threads = threads;
            CHECK_EQ(fst_fault_set(f->call, f->first, f->count, f->sys_errno, f->short_bytes), 0);
            int code = device_load_once(&made, &options, &stats);
            fst_fault_clear();
            if (!CHECK_EQ(code, f->code)) (void)fprintf(stderr, "    read fault %d\n", (int)i);
            CHECK_EQ(stats.direct_errno, f->direct_errno);
            (void)check_violations();
            fst_pool_shutdown();
        }
    }
}

static void test_truncated_file(void) {
    for (int mode = BUFFERED; mode <= (direct_works ? DIRECT : BUFFERED); mode++) {
        device_load l = {.made = test_create(BYTES, 3)};
        fst_job_options options = options_to(0, mode);
        options.threads = 1;
        l.file = test_open(&l.made);
        MUST(truncate(l.made.path, 2 * SLOT_BYTES + 100) == 0);
        l.arena = device_arena(BYTES, 0);
        l.all = (fst_segment){0, BYTES, 0};
        CHECK_EQ(fst_job_read(l.file, l.arena, &l.all, 1, &options, &l.job, &l.err), FST_OK);
        CHECK_EQ(job_result(l.job, &l.err), FST_E_TRUNCATED);
        CHECK(strstr(l.err.message, l.made.path) != NULL);
        device_end(&l);
        test_remove(&l.made);
    }
}

/* The staging block that cuFile does not let go of stays allocated. */
static void test_cufile_keeps_a_block(void) {
    if (device_kind != FST_GPU_CUDA || !direct_works) return;
    fst_job_stats stats;
    fst_job_options options = options_to(0, FST_READ_GDS);
    options.threads = 1;
    fst_pool_shutdown(); /* no block is spare */
    CHECK_EQ(FAKE(fake_fail)("cuFileBufDeregister", 1, 1, FAILED), 0);
    CHECK_EQ(device_load_once(&made, &options, &stats), FST_OK);
    CHECK_EQ(stats.bytes_gds, stats.bytes_total);
    fst_pool_shutdown();
    CHECK_EQ(FAKE(fake_fail)("cuFileBufDeregister", 0, 0, 0), 0);
    (void)check_violations();
    device_before.blocks++;
}

int main(void) {
    direct_works = test_direct_works();
    made = test_create(BYTES, 3);
    for (device_kind = FST_GPU_CUDA; device_kind <= FST_GPU_HIP; device_kind++) {
        RUN_ON(test_each_call_fails);
        RUN_ON(test_device_lost);
        RUN_ON(test_without_threads);
        RUN_ON(test_driver_memory_fails);
        RUN_ON(test_uploads_fail);
        RUN_ON(test_reads_fail);
        RUN_ON(test_truncated_file);
        RUN_ON(test_cufile_keeps_a_block);
    }
    test_remove(&made);
    return test_result();
}
