/* test_device_fork.c - a fork while copies are in flight: the parent's load goes on, and the
 * child, which cannot use the driver, touches nothing of it.
 */
#include "device.h"
#include "gate.h"

#include <sys/wait.h>

static void check_device_refuses(fst_file *file, fst_arena *arena) {
    fst_device *opened;
    fst_device_info info;
    fst_error err = {0};
    fst_job *job;
    int32_t equal;
    fst_segment all = {0, BYTES, 0};
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    CHECK_EQ(fst_device_open(device_kind, fake_path(), 0, &opened, &err), FST_E_DEVICE);
    CHECK_EQ(fst_device_open(!device_kind, fake_path(), 0, &opened, &err), FST_E_DEVICE);
    CHECK_EQ(fst_device_get_info(options.device, &info, &err), FST_E_DEVICE);
    CHECK_EQ(fst_job_read(file, arena, &all, 1, &options, &job, &err), FST_E_DEVICE);
    CHECK(job == NULL && strstr(err.message, "fork") != NULL);
    all.file_offset = (uintptr_t)&all;
    all.bytes = sizeof all;
    CHECK_EQ(fst_job_upload(arena, &all, 1, &options, &job, &err), FST_E_DEVICE);
    CHECK(job == NULL && strstr(err.message, "fork") != NULL);
    CHECK_EQ(fst_device_compare(options.device, arena, 0, file, 0, 9, &equal, &err), FST_E_DEVICE);
}

/* Loads to host memory work. */
static void check_host_load(void) {
    load own = start_load(7, FST_READ_DIRECT, 2);
    CHECK_EQ(wait_for(own.job), FST_OK);
    CHECK(bytes_right(&own));
    end_load(&own);
}

/* Never returns. */
static void child_main(device_load *parents, int result) {
    fst_pool_stats stats;
    (void)alarm(WATCHDOG_SECONDS);
    atomic_store(&fst_sys_in_force, real_calls);
    test_failures = 0;
    CHECK_EQ(job_result(parents->job, &parents->err), result);
    check_device_refuses(parents->file, parents->arena);
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.threads, 0);
    CHECK_EQ(stats.jobs, 0);
    CHECK_EQ(stats.pinned_bytes, 0);
    if (!UNDER_TSAN) check_host_load();
    fst_job_release(&parents->job);
    if (result != FST_OK) fst_arena_release(&parents->arena); /* is the driver's, and stays */
    fst_file_release(&parents->file);
    fst_pool_shutdown();
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.files, 0);
    (void)check_violations(); /* the fake counts every call */
    _exit(test_failures > 0);
}

static void check_child(pid_t child) {
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

static device_load start_gated(int mode, int threads, bool upload) {
    device_load l = {.made = test_create(BYTES, 9), .upload = upload};
    fst_job_options options = options_to(0, mode);
    options.threads = threads;
    gate_install(true);
    if (upload) gated_calls.mincore = gated_mincore;
    MUST(device_start(&l, &options) == FST_OK);
    return l;
}

static void end_gated(device_load *l) {
    gate_remove();
    CHECK_EQ(job_result(l->job, &l->err), FST_OK);
    CHECK(device_right(l));
    device_end(l);
    test_remove(&l->made);
}

/* Nobody waits for what is in flight: it neither reads nor writes memory that is shared. */
static void check_fork(int mode, int order, bool upload) {
    FAKE(fake_mode)(order, 3);
    device_load l = start_gated(mode, 2, upload);
    gate_allow(3);
    gate_wait(3, 2);
    pid_t child = fork();
    if (child == 0) child_main(&l, FST_E_CANCELLED);
    check_child(child);
    end_gated(&l);
}

static void test_fork_in_flight(void) {
    for (int order = FAKE_LATE_MODE; order <= FAKE_RANDOM_MODE; order++) {
        check_fork(FST_READ_BUFFERED, order, false);
        check_fork(FST_READ_DIRECT, order, false);
        check_fork(FST_READ_BUFFERED, order, true);
    }
}

/* Slots are spare and pinned; the child has none of them. */
static void test_fork_when_done(void) {
    device_load l = start_gated(FST_READ_BUFFERED, 2, false);
    gate_remove();
    CHECK_EQ(job_result(l.job, &l.err), FST_OK);
    pid_t child = fork();
    if (child == 0) child_main(&l, FST_OK);
    check_child(child);
    end_gated(&l);
}

int main(void) {
    for (device_kind = FST_GPU_CUDA; device_kind <= FST_GPU_HIP; device_kind++) {
        RUN_ON(test_fork_in_flight);
        RUN_ON(test_fork_when_done);
    }
    return test_result();
}
