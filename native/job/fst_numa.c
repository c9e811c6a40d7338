/* fst_numa.c - workers near the device or the disk they serve, where a machine has several nodes.
 *
 * Only our own threads are placed, within the CPUs they were started with, and only where
 * enough of those are near. Where the system gives no answer or refuses, they stay where they are.
 */
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/sysmacros.h>

#include "base/fst_sys.h"
#include "job/fst_numa.h"

#define NODES_MAX 64

static struct {
    const char *root;
    int nodes; /* that have CPUs */
    cpu_set_t cpus[NODES_MAX];
} machine = {.root = "/sys"};

static pthread_once_t looked = PTHREAD_ONCE_INIT;

/* Lists such as "0-3,8,10-11"; false where it is something else. */
static bool parse_list(const char *text, cpu_set_t *set) {
    CPU_ZERO(set);
    while (*text != '\0' && *text != '\n') {
        char *end;
        long first = strtol(text, &end, 10), last = first;
        if (end == text) return false;
        if (*end == '-') {
            text = end + 1;
            last = strtol(text, &end, 10);
            if (end == text) return false;
        }
        if (first < 0 || last < first || last >= CPU_SETSIZE) return false;
        for (long cpu = first; cpu <= last; cpu++) CPU_SET((size_t)cpu, set);
        text = *end == ',' ? end + 1 : end;
        if (*end != ',' && *end != '\0' && *end != '\n') return false;
    }
    return true;
}

static bool read_list(const char *path, cpu_set_t *set) {
    char text[8192];
    FILE *file = fopen(path, "re");
    if (file == NULL) return false;
    bool read = fgets(text, sizeof text, file) != NULL;
    (void)fclose(file);
    return read && parse_list(text, set);
}

static void look(void) {
    char path[PATH_MAX];
    cpu_set_t nodes;
    machine.nodes = 0;
    (void)snprintf(path, sizeof path, "%s/devices/system/node/has_cpu", machine.root);
    if (!read_list(path, &nodes)) return;
    for (int node = 0; node < NODES_MAX; node++) {
        CPU_ZERO(&machine.cpus[node]);
        if (!CPU_ISSET((size_t)node, &nodes)) continue;
        (void)snprintf(path, sizeof path, "%s/devices/system/node/node%d/cpulist", machine.root,
                       node);
        if (read_list(path, &machine.cpus[node])) machine.nodes++;
    }
}

void fst_numa_pretend(const char *root) {
    (void)pthread_once(&looked, look);
    machine.root = root;
    look();
}

int fst_numa_of_file(const fst_file *file) {
    /* A disk and its controller, then the same of the disk that a partition is on. */
    static const char *const places[] = {"device", "device/device", "../device",
                                         "../device/device"};
    (void)pthread_once(&looked, look);
    if (file == NULL || file->fed != NULL || machine.nodes < 2) return FST_ANYWHERE;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        long long node;
        if (fst_read_number(&node, "%s/dev/block/%u:%u/%s/numa_node", machine.root,
                            major(file->info.dev), minor(file->info.dev), places[i]))
            return (int)node;
    }
    return FST_ANYWHERE;
}

void fst_numa_start(fst_placement *place) {
    place->node = FST_ANYWHERE;
    place->placeable = sched_getaffinity(0, sizeof place->allowed, &place->allowed) == 0;
}

void fst_numa_place(fst_placement *place, int node, int threads) {
    cpu_set_t near;
    if (!place->placeable || node == place->node) return;
    (void)pthread_once(&looked, look);
    place->node = node;
    if (machine.nodes < 2) return;
    CPU_ZERO(&near);
    if (node >= 0 && node < NODES_MAX) CPU_AND(&near, &place->allowed, &machine.cpus[node]);
    /* Workers mostly wait for storage: half as many CPUs as workers are enough. */
    if (CPU_COUNT(&near) == 0 || 2 * CPU_COUNT(&near) < threads) near = place->allowed;
    (void)sched_setaffinity(0, sizeof near, &near);
}
