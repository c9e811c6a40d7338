/* test_numa.c - workers go near the disk or device that they serve, and callers stay where they
 * are. The tests read a made-up /sys with one node for each of two CPUs.
 */
#include "device.h"

#include <sched.h>
#include <sys/sysmacros.h>

#include "job/fst_pool.h"

static char root[PATH_MAX - 128];
static int cpus[2]; /* of this process; cpus[k] is on node k */

static void tell(const char *place, const char *text) {
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%s/%s", root, place);
    for (char *slash = path + strlen(root) + 1; (slash = strchr(slash, '/')) != NULL; slash++) {
        *slash = '\0';
        (void)mkdir(path, 0700);
        *slash = '/';
    }
    FILE *file = fopen(path, "we");
    MUST(file != NULL);
    MUST(fputs(text, file) >= 0);
    MUST(fclose(file) == 0);
}

static void tell_cpus(int node, const char *text) {
    char place[64];
    (void)snprintf(place, sizeof place, "devices/system/node/node%d/cpulist", node);
    tell(place, text);
}

/* Two nodes with a CPU each. */
static void tell_machine(void) {
    char text[32];
    tell("devices/system/node/has_cpu", "0-1\n");
    for (int node = 0; node < 2; node++) {
        (void)snprintf(text, sizeof text, "%d\n", cpus[node]);
        tell_cpus(node, text);
    }
    fst_numa_pretend(root);
}

/* The disk of the test files is on that node; places as in fst_numa.c. */
static void tell_disk(const fst_file *file, const char *place, const char *text) {
    char path[128];
    (void)snprintf(path, sizeof path, "dev/block/%u:%u/%s/numa_node", major(file->info.dev),
                   minor(file->info.dev), place);
    tell(path, text);
}

static void remove_root(void) {
    char command[PATH_MAX + 16];
    (void)snprintf(command, sizeof command, "rm -rf '%s'", root);
    MUST(system(command) == 0);
    MUST(mkdir(root, 0700) == 0);
}

static cpu_set_t mine(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    MUST(sched_getaffinity(0, sizeof set, &set) == 0);
    return set;
}

/* Where a worker near that node is. */
static cpu_set_t worker_at(int node) {
    cpu_set_t found;
    CPU_ZERO(&found);
    fst_queue_lock(); /* it is idle, and cannot leave meanwhile */
    bool placed = false;
    for (int i = 0; i < FST_MAX_THREADS; i++) {
        fst_worker *worker = &fst_pool.workers[i];
        if (!worker->alive || worker->place.node != node) continue;
        MUST(pthread_getaffinity_np(worker->thread, sizeof found, &found) == 0);
        placed = true;
    }
    fst_queue_unlock();
    CHECK(placed);
    return found;
}

/* The same after a load by some threads. */
static cpu_set_t worker_after(const test_file *file, fst_file *opened, int threads, int node) {
    fst_job_options options = {.struct_bytes = sizeof options,
                               .threads = threads,
                               .chunk_bytes = 64 << 10,
                               .mode = FST_READ_BUFFERED};
    const fst_segment all = {0, file->size, 0};
    fst_error err = {0};
    fst_arena *arena = NULL;
    fst_job *job = NULL;
    cpu_set_t before = mine(), after;
    MUST(fst_arena_alloc(file->size, &arena, &err) == FST_OK);
    MUST(fst_job_read(opened, arena, &all, 1, &options, &job, &err) == FST_OK);
    CHECK_EQ(job_result(job, &err), FST_OK);
    fst_job_release(&job);
    fst_arena_release(&arena);
    after = mine();
    CHECK(CPU_EQUAL(&before, &after));
    return worker_at(node);
}

static bool is_only(const cpu_set_t *set, int cpu) {
    return CPU_COUNT(set) == 1 && CPU_ISSET((size_t)cpu, set);
}

static void test_near_the_disk(void) {
    static const char *const places[] = {"device", "device/device"};
    test_file file = test_create(300000, 1);
    fst_file *opened = test_open(&file);
    cpu_set_t all = mine(), found;
    for (size_t i = 0; i < 2; i++) {
        remove_root();
        tell_disk(opened, places[i], "1\n");
        tell_machine();
        CHECK_EQ(fst_numa_of_file(opened), 1);
        found = worker_after(&file, opened, 2, 1);
        CHECK(is_only(&found, cpus[1]));
        tell_disk(opened, places[i], "0\n"); /* the same worker serves another disk */
        found = worker_after(&file, opened, 2, 0);
        CHECK(is_only(&found, cpus[0]));
        tell_disk(opened, places[i], "-1\n");
        found = worker_after(&file, opened, 2, FST_ANYWHERE);
        CHECK(CPU_EQUAL(&found, &all));
        fst_pool_shutdown();
    }
    fst_file_release(&opened);
    test_remove(&file);
}

static void test_too_few_are_near(void) {
    test_file file = test_create(300000, 2);
    fst_file *opened = test_open(&file);
    cpu_set_t all = mine(), found;
    remove_root();
    tell_disk(opened, "device", "1\n");
    tell_machine();
    found = worker_after(&file, opened, 3, 1); /* three workers, one CPU */
    CHECK(CPU_EQUAL(&found, &all));
    fst_pool_shutdown();
    tell_cpus(1, "1000\n"); /* none that we may use */
    fst_numa_pretend(root);
    found = worker_after(&file, opened, 1, 1);
    CHECK(CPU_EQUAL(&found, &all));
    fst_pool_shutdown();
    fst_file_release(&opened);
    test_remove(&file);
}

static void test_near_the_device(void) {
    test_file file = test_create(300000, 4);
    fst_job_options options = options_to(0, FST_READ_BUFFERED);
    fst_job_stats stats;
    cpu_set_t found;
    remove_root();
    tell_machine();
    options.threads = 2;
    for (int node = 0; node < 2; node++) {
        device_at(0)->numa_node = node;
        CHECK_EQ(device_load_once(&file, &options, &stats), FST_OK);
        found = worker_at(node);
        CHECK(is_only(&found, cpus[node]));
        CHECK_EQ(device_upload_once(&file, &options, &stats), FST_OK);
        found = worker_at(node);
        CHECK(is_only(&found, cpus[node]));
    }
    device_at(0)->numa_node = FST_ANYWHERE;
    fst_pool_shutdown();
    test_remove(&file);
}

static void test_what_the_system_may_tell(void) {
    static const struct {
        const char *has_cpu, *cpulist, *disk;
        int node;
    } cases[] = {
        {"0-1\n", "0-3,8\n", "1\n", 1},
        {"0,1", "0", "1", 1},
        {"0\n", "0\n", "0\n", FST_ANYWHERE}, /* one node: nothing to choose */
        {"", "0\n", "1\n", FST_ANYWHERE},
        {"0-1\n", "none\n", "1\n", FST_ANYWHERE},
        {"0-1\n", "3-1\n", "1\n", FST_ANYWHERE},
        {"0-1\n", "0-\n", "1\n", FST_ANYWHERE},
        {"0-1\n", "0;1\n", "1\n", FST_ANYWHERE},
        {"0-1\n", "0-99999999999999999999\n", "1\n", FST_ANYWHERE},
        {"0-1\n", "-1\n", "1\n", FST_ANYWHERE},
        {"0-1\n", "0\n", "x\n", FST_ANYWHERE},
        {"0-1\n", "0\n", "", FST_ANYWHERE},
    };
    test_file file = test_create(1000, 3);
    fst_file *opened = test_open(&file);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        remove_root();
        tell("devices/system/node/has_cpu", cases[i].has_cpu);
        tell_cpus(0, cases[i].cpulist);
        tell_cpus(1, cases[i].cpulist);
        tell_disk(opened, "device", cases[i].disk);
        fst_numa_pretend(root);
        if (!CHECK_EQ(fst_numa_of_file(opened), cases[i].node))
            (void)fprintf(stderr, "case %zu\n", i);
    }
    remove_root();
    fst_numa_pretend(root); /* nothing at all */
    CHECK_EQ(fst_numa_of_file(opened), FST_ANYWHERE);
    CHECK_EQ(fst_numa_of_file(NULL), FST_ANYWHERE);
    fst_file_release(&opened);
    test_remove(&file);
}

int main(void) {
    const char *folder = getenv("TMPDIR");
    cpu_set_t set = mine();
    int found = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
        if (CPU_ISSET((size_t)cpu, &set)) cpus[found++] = cpu;
    (void)snprintf(root, sizeof root, "%s/fst-sys-%d", folder == NULL ? "/tmp" : folder, getpid());
    MUST(mkdir(root, 0700) == 0);
    RUN(test_what_the_system_may_tell);
    if (found == 2) { /* else there is no other place to go to */
        RUN(test_near_the_disk);
        RUN(test_too_few_are_near);
        RUN_ON(test_near_the_device);
    }
    fst_numa_pretend("/sys");
    remove_root();
    (void)rmdir(root);
    return test_result();
}
