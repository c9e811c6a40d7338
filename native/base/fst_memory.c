/* fst_memory.c - how much memory may still be taken: /proc/meminfo and the cgroups. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fst_base.h"
#include "base/fst_sys.h"

/* The number behind "key " in a file of "key value" lines. */
static bool read_field(const char *path, const char *key, uint64_t *out) {
    char line[256];
    size_t key_bytes = strlen(key);
    FILE *file = fopen(path, "re");
    if (file == NULL) return false;
    bool found = false;
    while (!found && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, key, key_bytes) != 0) continue;
        char *end;
        unsigned long long value = strtoull(line + key_bytes, &end, 10);
        found = end != line + key_bytes;
        *out = value;
    }
    (void)fclose(file);
    return found;
}

/* Headroom of one cgroup folder; UINT64_MAX where it sets no limit. */
static uint64_t folder_headroom(const char *folder, bool v2) {
    char path[1024];
    long long limit, taken; /* the limit may read "max": there is none */
    uint64_t active = 0, inactive = 0;
    const char *limit_name = v2 ? "memory.max" : "memory.limit_in_bytes";
    const char *taken_name = v2 ? "memory.current" : "memory.usage_in_bytes";
    if (!fst_read_number(&limit, "%s/%s", folder, limit_name) ||
        !fst_read_number(&taken, "%s/%s", folder, taken_name))
        return UINT64_MAX;
    int length = snprintf(path, sizeof path, "%s/memory.stat", folder);
    if (length > 0 && (size_t)length < sizeof path) {
        (void)read_field(path, v2 ? "active_file " : "total_active_file ", &active);
        (void)read_field(path, v2 ? "inactive_file " : "total_inactive_file ", &inactive);
    }
    uint64_t cached = active + inactive, most = (uint64_t)limit, used = (uint64_t)taken;
    used = used > cached ? used - cached : 0;
    return most > used ? most - used : 0;
}

/* A cgroup's limit is the least over it and its ancestors. */
static uint64_t group_headroom(const char *mount, char *group, bool v2) {
    char folder[1024];
    uint64_t least = UINT64_MAX;
    for (;;) {
        int written = snprintf(folder, sizeof folder, "%s%s", mount, group);
        if (written > 0 && (size_t)written < sizeof folder)
            least = fst_min(least, folder_headroom(folder, v2));
        char *slash = strrchr(group, '/');
        if (slash == NULL) return least;
        if (slash == group && group[1] == '\0') return least;
        *slash = '\0';
    }
}

static uint64_t cgroup_headroom(void) {
    char line[1024];
    uint64_t least = UINT64_MAX;
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (file == NULL) return least;
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers == NULL ? NULL : strchr(controllers + 1, ':');
        if (group == NULL) continue;
        *group++ = '\0';
        controllers++;
        if (controllers[0] == '\0')
            least = fst_min(least, group_headroom("/sys/fs/cgroup", group, true));
        else if (strcmp(controllers, "memory") == 0)
            least = fst_min(least, group_headroom("/sys/fs/cgroup/memory", group, false));
    }
    (void)fclose(file);
    return least;
}

uint64_t fst_memory_headroom(void) {
    uint64_t available, least = cgroup_headroom();
    if (read_field("/proc/meminfo", "MemAvailable:", &available))
        least = fst_min(least, available * 1024);
    return least;
}
