/* test_device_order.c - the ordering rules of fst_gpu.h, one case each at least: run.sh builds
 * the engine without a rule and sees each of the rule's cases fail.
 *
 *   test_device_order          all cases
 *   test_device_order list     prints each case, with its rule before it
 *   test_device_order CASE     that case only
 */
#include "device.h"
#include "gate.h"

static bool alone; /* one case was asked for: it says so when it cannot run here */

/* One worker, which stops at the gate before it reads, or looks at, chunk number n: the copies
 * of the chunks before that have been started, and all but the last one were waited for. */
static device_load start_gated(uint64_t reads, bool upload) {
    device_load l = {.made = test_create(BYTES, 9), .upload = upload};
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    options.threads = 1;
    gate_install(true);
    if (upload) gated_calls.mincore = gated_mincore;
    MUST(device_start(&l, &options) == FST_OK);
    gate_allow((int)reads);
    gate_wait((int)reads, 1);
    return l;
}

static void end_gated(device_load *l) {
    gate_remove();
    device_end(l);
    test_remove(&l->made);
}

/* ---- ALLOCATION ---- */

/* What was pending on the block comes before our copies, not after. */
static void test_allocation(void) {
    fst_job_stats stats;
    test_file made = test_create(BYTES, 9);
    for (int mode = FAKE_LATE_MODE; mode <= FAKE_RANDOM_MODE; mode++) {
        FAKE(fake_mode)(mode, 1);
        for (int ordinal = 0; ordinal < DEVICES; ordinal++) {
            fst_job_options options = options_to(ordinal, FST_READ_BUFFERED);
            CHECK_EQ(device_load_once(&made, &options, &stats), FST_OK);
        }
    }
    test_remove(&made);
}

static void test_allocation_upload(void) {
    fst_job_stats stats;
    test_file made = test_create(BYTES, 9);
    fst_job_options options = options_to(1, FST_READ_BUFFERED);
    CHECK_EQ(device_upload_once(&made, &options, &stats), FST_OK);
    test_remove(&made);
}

/* On the default stream, too; and each job waits for its own block's stream. */
static void test_allocation_default_stream(void) {
    device_load l = {.made = test_create(BYTES, 9)};
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    uintptr_t usual = device_streams[0];
    device_streams[0] = options.stream = 0;
    CHECK_EQ(device_start(&l, &options), FST_OK);
    CHECK_EQ(job_result(l.job, &l.err), FST_OK);
    CHECK(device_right(&l));
    device_streams[0] = usual;
    device_end(&l);
    test_remove(&l.made);
}

/* ---- SLOT ---- */

/* Every chunk goes through the same slot, whose copies are late. */
static void check_slot(bool upload) {
    fst_job_stats stats;
    test_file made = test_create(BYTES, 9);
    for (int slots = 1; slots <= 3; slots++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            fst_job_options options = options_to(0, FST_READ_BUFFERED);
            options.threads = threads;
            options.pinned_bytes = (uint64_t)slots * SLOT_BYTES;
            device_load l = {.made = made, .upload = upload};
            CHECK_EQ(device_run_once(&l, &options, &stats), FST_OK);
        }
    }
    test_remove(&made);
}

static void test_slot(void) { check_slot(false); }

static void test_slot_upload(void) { check_slot(true); }

/* ---- STAGING ---- */

/* Every chunk lands in the same staging block, out of which copies are late. */
static void test_staging(void) {
    fst_job_stats stats;
    if (!test_direct_works()) { /* cuFile needs such a descriptor */
        if (alone) exit(77);
        return;
    }
    test_file made = test_create(BYTES, 9);
    fst_job_options options = options_to(0, FST_READ_GDS);
    options.threads = 1;
    CHECK_EQ(device_load_once(&made, &options, &stats), FST_OK);
    CHECK_EQ(stats.gds_refused, 0);
    CHECK_EQ(stats.bytes_gds, stats.bytes_total);
    test_remove(&made);
}

/* ---- LANDED ---- */

/* Chunk 1 was waited for; the copy of chunk 2 is pending and nothing forces it. */
static void check_landed(bool upload) {
    device_load l = start_gated(2, upload);
    uint64_t first = CHUNK, second = 2 * CHUNK;
    CHECK_EQ(device_wait_until(&l, first, 1000), FST_OK);
    CHECK(segments_right(&l.made, l.arena, &l.all, 1, first));
    CHECK_EQ(device_wait_until(&l, first + 1, 20), FST_PENDING);
    CHECK_EQ(device_wait_until(&l, second, 0), FST_PENDING);
    CHECK_EQ(device_wait_until(&l, UINT64_MAX, 0), FST_PENDING);
    CHECK_EQ(fst_job_wait(l.job, 0, &l.err), FST_PENDING);
    CHECK(!segments_right(&l.made, l.arena, &l.all, 1, second)); /* it would have been wrong */
    gate_allow(1);
    gate_wait(3, 1);
    CHECK_EQ(device_wait_until(&l, second, 1000), FST_OK);
    CHECK(segments_right(&l.made, l.arena, &l.all, 1, second));
    gate_remove();
    CHECK_EQ(job_result(l.job, &l.err), FST_OK);
    CHECK(device_right(&l));
    end_gated(&l);
}

static void test_landed(void) { check_landed(false); }

static void test_landed_upload(void) { check_landed(true); }

/* ---- RELEASE ---- */

static void *release_job(void *argument) {
    fst_job *job = argument;
    fst_job_release(&job);
    return NULL;
}

/* Every other user is gone: the block is free the moment the job lets go of it, and the fake
 * tells if a copy was pending then. */
static void check_released(device_load *l) {
    fake_counts live;
    fst_arena_release(&l->arena);
    l->arena = NULL;
    FAKE(fake_live)(&live);
    CHECK_EQ(live.blocks, 1); /* the job's */
}

static void check_release_cancelled(bool upload) {
    device_load l = start_gated(2, upload);
    check_released(&l);
    CHECK(FAKE(fake_pending)() > 0);
    fst_job_cancel(l.job);
    CHECK_EQ(fst_job_wait(l.job, 0, &l.err), FST_PENDING); /* a copy is in flight */
    gate_remove();
    CHECK_EQ(job_result(l.job, &l.err), FST_E_CANCELLED);
    (void)check_violations();
    end_gated(&l);
}

static void test_release_cancelled(void) { check_release_cancelled(false); }

static void test_release_cancelled_upload(void) { check_release_cancelled(true); }

static void test_release_failed(void) {
    test_file made = test_create(BYTES, 9);
    for (uint64_t call = 2; call <= 4; call++) {
        device_load l = {.made = made};
        fst_job_options options = options_to(0, FST_READ_BUFFERED);
        options.threads = 1;
        CHECK_EQ(fst_fault_set("preadv", call, 1, EIO, 0), 0);
        MUST(device_start(&l, &options) == FST_OK);
        fst_arena_release(&l.arena);
        l.arena = NULL;
        CHECK_EQ(job_result(l.job, &l.err), FST_E_SYS);
        (void)check_violations();
        fst_fault_clear();
        device_end(&l);
    }
    test_remove(&made);
}

/* A driver's call of an upload fails, after which nothing else would wait for the stream. */
static void test_release_failed_upload(void) {
    for (uint64_t call = 2; call <= 4; call++) {
        FAKE(fake_clear)();
        CHECK_EQ(FAKE(fake_fail)("cuStreamWaitEvent", call, 1, 719), 0);
        device_load l = start_gated(0, true);
        check_released(&l); /* before the job fails: its own use is the last */
        gate_remove();
        CHECK_EQ(job_result(l.job, &l.err), FST_E_DEVICE);
        (void)check_violations();
        end_gated(&l);
    }
}

/* A release waits: when it is back, the memory may be anybody's. */
static void check_release_waits(bool upload) {
    pthread_t thread;
    fake_counts live;
    device_load l = start_gated(2, upload);
    check_released(&l);
    MUST(pthread_create(&thread, NULL, release_job, l.job) == 0);
    for (int i = 0; i < 20; i++) nap(); /* one that does not wait would be back */
    FAKE(fake_live)(&live);
    CHECK_EQ(live.blocks, 1);
    gate_remove();
    MUST(pthread_join(thread, NULL) == 0);
    FAKE(fake_live)(&live);
    CHECK_EQ(live.blocks, 0);
    l.job = NULL;
    (void)check_violations();
    end_gated(&l);
}

static void test_release_waits(void) { check_release_waits(false); }

static void test_release_waits_upload(void) { check_release_waits(true); }

/* ---- CAPTURE ---- */

/* A graph is captured by another thread, from before the job begins or from its middle on. Slots
 * are pinned, events are made, asked and waited for, and slots are unpinned meanwhile. */
static void check_capture(bool upload, bool from_the_start) {
    int mode = 0;
    if (from_the_start) FAKE(fake_capture)(1);
    device_load l = start_gated(2, upload);
    FAKE(fake_capture)(1);
    gate_remove();
    CHECK_EQ(job_result(l.job, &l.err), FST_OK);
    CHECK(device_right(&l));
    end_gated(&l);
    fst_pool_shutdown();
    CHECK_EQ(FAKE(cuThreadExchangeStreamCaptureMode)(&mode), 0);
    CHECK_EQ(mode, 0); /* this thread's own is as before */
    (void)check_violations();
}

static void test_capture(void) { check_capture(false, true); }

static void test_capture_from_the_middle(void) { check_capture(false, false); }

static void test_capture_upload(void) { check_capture(true, true); }

static void test_capture_hip(void) {
    fst_job_stats stats;
    test_file made = test_create(BYTES, 9);
    device_kind = FST_GPU_HIP;
    device_open_all();
    FAKE(fake_live)(&device_before); /* streams of a device stay */
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    FAKE(fake_capture)(1);
    CHECK_EQ(device_load_once(&made, &options, &stats), FST_OK);
    fst_pool_shutdown();
    (void)check_violations();
    device_kind = FST_GPU_CUDA;
    test_remove(&made);
}

static void test_capture_gds(void) {
    fst_job_stats stats;
    if (!test_direct_works()) {
        if (alone) exit(77);
        return;
    }
    test_file made = test_create(BYTES, 9);
    fst_job_options options = options_to(0, FST_READ_GDS);
    FAKE(fake_capture)(1);
    CHECK_EQ(device_load_once(&made, &options, &stats), FST_OK);
    CHECK_EQ(stats.bytes_gds, stats.bytes_total);
    fst_pool_shutdown();
    (void)check_violations();
    test_remove(&made);
}

/* ---- ask: fetched bytes go on only if the job was not given up ---- */

static int64_t feed_late(void *context, uint64_t offset, uint64_t bytes, void *into) {
    (void)context, (void)offset;
    gate_pass(0);
    memset(into, 7, bytes);
    return (int64_t)bytes;
}

/* The memory is the caller's again while a callback still runs. */
static void test_ask(void) {
    fst_file *file = NULL;
    fst_file_info info;
    fst_arena *arena = NULL;
    fst_job *job = NULL;
    fst_error err = {0};
    fst_segment all = {0, CHUNK, 0};
    fst_job_options options = {.struct_bytes = sizeof options, .threads = 1, .chunk_bytes = CHUNK};
    unsigned char *memory = calloc(1, CHUNK);
    MUST(memory != NULL);
    gate.allowed = gate.inside = gate.passed = gate.entered = 0;
    MUST(fst_file_feed("fed", CHUNK, 1, feed_late, NULL, &file, &info, &err) == FST_OK);
    MUST(fst_arena_borrow(memory, CHUNK, &arena, &err) == FST_OK);
    MUST(fst_job_read(file, arena, &all, 1, &options, &job, &err) == FST_OK);
    gate_wait(0, 1);
    fst_job_release(&job);
    gate_allow(OPEN);
    fst_pool_shutdown();
    for (int i = 0; i < CHUNK; i++)
        if (memory[i] != 0) {
            FAIL("written to after the job was released");
            break;
        }
    fst_arena_release(&arena);
    fst_file_release(&file);
    free(memory);
}

/* ---- which case is whose ---- */

static const struct {
    const char *rule; /* FST_RULE_... */
    const char *name;
    void (*run)(void);
} cases[] = {
#define CASE(rule, function) {rule, #function, function}
    CASE("ALLOCATION", test_allocation),
    CASE("ALLOCATION", test_allocation_default_stream),
    CASE("ALLOCATION", test_allocation_upload),
    CASE("SLOT", test_slot),
    CASE("SLOT", test_slot_upload),
    CASE("STAGING", test_staging),
    CASE("LANDED", test_landed),
    CASE("LANDED", test_landed_upload),
    CASE("RELEASE", test_release_cancelled),
    CASE("RELEASE", test_release_cancelled_upload),
    CASE("RELEASE", test_release_failed),
    CASE("RELEASE", test_release_failed_upload),
    CASE("RELEASE", test_release_waits),
    CASE("RELEASE", test_release_waits_upload),
    CASE("CAPTURE", test_capture),
    CASE("CAPTURE", test_capture_from_the_middle),
    CASE("CAPTURE", test_capture_upload),
    CASE("CAPTURE", test_capture_hip),
    CASE("CAPTURE", test_capture_gds),
    CASE("ASK", test_ask),
#undef CASE
};

enum {
    CASES = sizeof cases / sizeof *cases
};

static int list_cases(void) {
    for (int i = 0; i < CASES; i++) (void)printf("%s %s\n", cases[i].rule, cases[i].name);
    return 0;
}

static int running; /* of cases */

static void one_case(void) {
    test_case = cases[running].name;
    cases[running].run();
}

int main(int count, char **arguments) {
    const char *only = count > 1 ? arguments[1] : NULL;
    alone = only != NULL;
    int ran = 0;
    if (only != NULL && strcmp(only, "list") == 0) return list_cases();
    for (running = 0; running < CASES; running++) {
        if (only != NULL && strcmp(cases[running].name, only) != 0) continue;
        RUN_ON(one_case);
        ran++;
    }
    return ran == 0 ? 77 : test_result();
}
