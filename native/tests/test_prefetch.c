/* test_prefetch.c - read-ahead brings the bytes in or says how many it skipped, whatever the
 * system calls do; what is mapped stays the file's.
 */
#include "plan.h"

#include "file/fst_file.h"
#include "io/fst_fill_mode.h"

static fst_job_stats prefetch(const test_file *file, fst_file *opened, const plan *p,
                              uint64_t reserve, bool check) {
    fst_job_options options = options_for(0);
    fst_job_stats stats = {0};
    fst_error err = {0};
    fst_arena *map = NULL;
    fst_job *job = NULL;
    options.reserve_bytes = reserve;
    if (reserve > 0) options.threads = 1; /* others may go on until one has looked */
    MUST(fst_arena_map(opened, &map, &err) == FST_OK);
    if (CHECK_EQ(fst_job_prefetch(opened, map, p->segments, p->count, &options, &job, &err),
                 FST_OK))
        CHECK_EQ(wait_for(job, &err), FST_OK); /* errors only stop it */
    fst_job_get_stats(job, &stats);
    fst_job_release(&job);
    CHECK(stats.done);
    CHECK_EQ(stats.bytes_done + stats.bytes_skipped, p->bytes);
    const unsigned char *bytes = fst_arena_data(map);
    for (uint64_t i = 0; check && i < p->count; i++)
        for (uint64_t k = 0; k < p->segments[i].bytes; k += 97) {
            uint64_t at = p->segments[i].file_offset + k;
            if (bytes[at] == test_byte(at, file->salt)) continue;
            FAIL("a byte of the map is wrong");
            return stats;
        }
    fst_arena_release(&map);
    return stats;
}

/* With no probe left, nothing is known to be cached and every chunk is worked on. */
static void blind_probes(void) {
    CHECK_EQ(fst_fault_set("cachestat", 1, ALL, ENOSYS, 0), 0);
    CHECK_EQ(fst_fault_set("preadv2", 1, ALL, EOPNOTSUPP, 0), 0);
    CHECK_EQ(fst_fault_set("mincore", 1, ALL, ENOSYS, 0), 0);
}

static const struct {
    const char *what;
    const char *call;
    uint64_t first, count;
    int sys_errno;
    uint64_t short_bytes;
    bool old_kernel; /* without MADV_POPULATE_READ */
    bool skips;
} prefetch_faults[] = {
    {"no readahead", "readahead", 1, ALL, EINVAL, 0, false, false},
    {"EINTR", "madvise", 1, 20, EINTR, 0, false, false},
    {"EAGAIN", "madvise", 1, 20, EAGAIN, 0, false, false},
    {"EAGAIN for ever", "madvise", 1, ALL, EAGAIN, 0, false, true},
    {"unreadable", "madvise", 3, 1, EFAULT, 0, false, true},
    {"poisoned", "madvise", 1, ALL, EHWPOISON, 0, false, true},
    {"no thread", "pthread_create", 1, ALL, EAGAIN, 0, false, true},
    {"one thread", "pthread_create", 2, ALL, EAGAIN, 0, false, false},
    {"old kernel", "readahead", 1, ALL, EINVAL, 0, true, false},
    {"old kernel, short", "pread", 1, ALL, 0, 1000, true, false},
    {"old kernel, EINTR", "pread", 1, 100, EINTR, 0, true, false},
    {"old kernel, EIO", "pread", 2, 1, EIO, 0, true, true},
    {"old kernel, no buffer", "mmap", 2, ALL, ENOMEM, 0, true, true}, /* the first is the map */
};

static void test_prefetch(void) {
    uint64_t random = 5;
    test_file file = test_create((1 << 20) + 99, 5);
    fst_file *opened = test_open(&file);
    for (int i = 0; i < 5; i++) {
        plan p = random_plan(file.size, &random);
        CHECK_EQ(prefetch(&file, opened, &p, 0, true).bytes_skipped, 0);
        blind_probes();
        fst_job_stats stats = prefetch(&file, opened, &p, 0, true);
        CHECK_EQ(stats.bytes_skipped, 0);
        CHECK(stats.bytes_cold >= p.bytes);
        fst_fault_clear();
        free_plan(&p);
    }
    fst_file_release(&opened);
    test_remove(&file);
}

static void test_prefetch_faults(void) {
    test_file file = test_create((1 << 20) + 99, 5);
    plan p = whole_plan(file.size);
    fst_file *opened = test_open(&file);
    for (size_t i = 0; i < sizeof prefetch_faults / sizeof *prefetch_faults; i++) {
        test_case = prefetch_faults[i].what;
        blind_probes();
        if (prefetch_faults[i].old_kernel) CHECK_EQ(fst_fault_set("madvise", 1, ALL, EINVAL, 0), 0);
        CHECK_EQ(fst_fault_set(prefetch_faults[i].call, prefetch_faults[i].first,
                               prefetch_faults[i].count, prefetch_faults[i].sys_errno,
                               prefetch_faults[i].short_bytes),
                 0);
        fst_job_stats stats = prefetch(&file, opened, &p, 0, true);
        CHECK(fst_fault_calls(prefetch_faults[i].call) > 0);
        CHECK_EQ(stats.bytes_skipped > 0, prefetch_faults[i].skips);
        fst_fault_clear();
        fst_pool_shutdown();
    }
    fst_file_release(&opened);
    free_plan(&p);
    test_remove(&file);
}

static void test_prefetch_limits(void) {
    test_file file = test_create(1 << 20, 5), other = test_create(5000, 1);
    plan p = whole_plan(file.size);
    fst_file *opened = test_open(&file), *wrong = test_open(&other);
    fst_job_options options = options_for(0);
    fst_error err = {0};
    fst_arena *memory = NULL, *map = NULL;
    fst_job *job = NULL;
    if (fst_memory_headroom() != UINT64_MAX) /* less memory is left than must be left */
        CHECK_EQ(prefetch(&file, opened, &p, UINT64_MAX, true).bytes_skipped, p.bytes);
    MUST(fst_arena_alloc(file.size, &memory, &err) == FST_OK);
    MUST(fst_arena_map(wrong, &map, &err) == FST_OK);
    CHECK_EQ(fst_job_prefetch(opened, memory, p.segments, 1, &options, &job, &err), FST_E_INVALID);
    CHECK_EQ(fst_job_prefetch(opened, map, p.segments, 1, &options, &job, &err), FST_E_INVALID);
    CHECK_EQ(fst_job_prefetch(wrong, map, p.segments, 1, &options, &job, &err), FST_E_INVALID);
    CHECK(job == NULL);
    fst_arena_release(&memory);
    fst_arena_release(&map);
    fst_file_release(&opened);
    fst_file_release(&wrong);
    free_plan(&p);
    test_remove(&file);
    test_remove(&other);
}

/* How many bytes of a map are advised to be read at random. */
static uint64_t random_bytes(fst_arena *map) {
    uintptr_t from = (uintptr_t)fst_arena_data(map), to = from + fst_arena_bytes(map);
    unsigned long long begin = 0, end = 0, a, b;
    uint64_t found = 0;
    char line[512];
    FILE *file = fopen("/proc/self/smaps", "re");
    MUST(file != NULL);
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "%llx-%llx ", &a, &b) == 2) {
            begin = a;
            end = b;
        }
        bool mine = begin >= from && begin < to;
        if (mine && strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " rr") != NULL)
            found += end - begin;
    }
    (void)fclose(file);
    return found;
}

static const struct {
    const char *what;
    fst_segment wanted[3]; /* in MiB */
    uint64_t count;
    uint64_t random; /* in MiB */
} extents[] = {
    {"nothing", {{0}}, 0, 0},
    {"everything", {{0, 400, 0}}, 1, 0},
    {"everything, in pieces", {{0, 3, 0}, {3, 0, 0}, {3, 397, 0}}, 3, 0},
    {"up to the end", {{10, 390, 0}}, 1, 64},
    {"from the beginning", {{0, 390, 0}}, 1, 64},
    {"a short one", {{1, 2, 0}}, 1, 2},
    {"a long one", {{10, 300, 0}}, 1, 128},
    {"its ends near each other", {{10, 150, 0}}, 1, 150},
    {"one from neighbours", {{10, 50, 0}, {60, 250, 0}}, 2, 128},
    {"near each other", {{0, 1, 0}, {2, 1, 0}, {4, 1, 0}}, 3, 5},
    {"far apart", {{0, 1, 0}, {100, 1, 0}}, 2, 2},
    {"the last to the end", {{0, 1, 0}, {100, 300, 0}}, 2, 65},
    {"beyond the file", {{0, 500, 0}}, 1, 0},
};

static void test_keep_to(void) {
    test_file file = test_create(0, 5);
    MUST(truncate(file.path, 400 << 20) == 0); /* sparse: only advice is looked at */
    fst_file *opened = test_open(&file);
    fst_job_options options = options_for(0);
    fst_error err = {0};
    for (size_t i = 0; i < sizeof extents / sizeof *extents; i++) {
        fst_segment wanted[3];
        fst_arena *map = NULL;
        fst_job *job = NULL;
        test_case = extents[i].what;
        for (uint64_t k = 0; k < extents[i].count; k++)
            wanted[k] = (fst_segment){extents[i].wanted[k].file_offset << 20,
                                      extents[i].wanted[k].bytes << 20, 0};
        MUST(fst_arena_map(opened, &map, &err) == FST_OK);
        fst_arena_keep_to(map, wanted, extents[i].count);
        CHECK_EQ(random_bytes(map) >> 20, extents[i].random);
        /* What is given up is not left to be read page by page. */
        fst_segment first = {0, 1 << 20, 0};
        options.reserve_bytes = UINT64_MAX;
        CHECK_EQ(fst_job_prefetch(opened, map, &first, 1, &options, &job, &err), FST_OK);
        CHECK_EQ(wait_for(job, &err), FST_OK);
        fst_job_release(&job);
        if (fst_memory_headroom() != UINT64_MAX) CHECK_EQ(random_bytes(map), 0);
        fst_arena_release(&map);
    }
    fst_arena *memory = NULL;
    MUST(fst_arena_alloc(1 << 20, &memory, &err) == FST_OK);
    fst_arena_keep_to(memory, &(fst_segment){0, 5000, 0}, 1); /* no map: nothing to advise */
    CHECK_EQ(random_bytes(memory), 0);
    fst_arena_release(&memory);
    fst_file_release(&opened);
    test_remove(&file);
}

/* Into how many areas of the process a file's map is split. */
static uint64_t areas_of(fst_arena *map) {
    uintptr_t from = (uintptr_t)fst_arena_data(map), to = from + fst_arena_bytes(map);
    unsigned long long begin, end;
    uint64_t found = 0;
    char line[512];
    FILE *file = fopen("/proc/self/maps", "re");
    MUST(file != NULL);
    while (fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "%llx-%llx ", &begin, &end) == 2) found += begin >= from && begin < to;
    (void)fclose(file);
    return found;
}

enum {
    AREAS_MORE = 64 /* of a process's 65,530: a checkpoint has some hundred files */
};

/* However many extents are wanted, and however far apart: a map stays in few pieces. */
static void test_areas(void) {
    static fst_segment wanted[4000];
    static const struct {
        uint64_t every, bytes, count;
    } scattered[] = {{12, 4, 200}, {200, 8, 100}, {80, 1, 250}, {5, 1, 4000}};
    test_file file = test_create(0, 5);
    MUST(truncate(file.path, (off_t)20 << 30) == 0); /* sparse */
    fst_file *opened = test_open(&file);
    fst_error err = {0};
    for (size_t i = 0; i < sizeof scattered / sizeof *scattered; i++) {
        fst_arena *map = NULL;
        for (uint64_t k = 0; k < scattered[i].count; k++)
            wanted[k] =
                (fst_segment){(k * scattered[i].every + 1) << 20, scattered[i].bytes << 20, 0};
        MUST(fst_arena_map(opened, &map, &err) == FST_OK);
        fst_arena_keep_to(map, wanted, scattered[i].count);
        CHECK(random_bytes(map) > 0);
        uint64_t areas = areas_of(map);
        CHECK(areas > 1 && areas <= 1 + AREAS_MORE);
        fst_arena_release(&map);
    }
    /* Reading them ahead takes none at all. */
    fst_arena *map = NULL;
    fst_job *job = NULL;
    fst_job_options options = options_for(0);
    options.chunk_bytes = 4 << 20;
    for (uint64_t k = 0; k < 64; k++) wanted[k] = (fst_segment){(k * 12) << 20, 4 << 20, 0};
    MUST(fst_arena_map(opened, &map, &err) == FST_OK);
    CHECK_EQ(fst_job_prefetch(opened, map, wanted, 64, &options, &job, &err), FST_OK);
    CHECK_EQ(wait_for(job, &err), FST_OK);
    fst_job_release(&job);
    CHECK_EQ(areas_of(map), 1);
    fst_arena_release(&map);
    fst_file_release(&opened);
    test_remove(&file);
}

/* Where no probe tells, faults do: what is cached is found to be, without a look at it. */
static void test_unprobed(void) {
    test_file file = test_create((8 << 20) + 99, 5);
    plan p = whole_plan(file.size);
    fst_file *opened = test_open(&file);
    CHECK_EQ(prefetch(&file, opened, &p, 0, true).bytes_skipped, 0);
    CHECK_EQ(fst_fault_set("cachestat", 1, ALL, EPERM, 0), 0);
    CHECK_EQ(fst_fault_set("mincore", 1, ALL, ENOSYS, 0), 0);
    fst_job_stats stats = prefetch(&file, opened, &p, 0, true);
    CHECK_EQ(stats.bytes_skipped, 0);
    CHECK_EQ(fst_fault_calls("pread") + fst_fault_calls("preadv"), 0);
    fst_fault_clear();
    fst_file_release(&opened);
    free_plan(&p);
    test_remove(&file);
}

/* Faults of a chunk's own open file description bring it in; where that cannot be opened, huge
 * pages do. The kernel's window may be larger than the test says: more is cached then, not less. */
static void test_read_by_faults(void) {
    const uint64_t size = (8 << 20) + 99;
    test_file file = test_create(size, 5);
    plan p = whole_plan(size);
    for (int refused = 0; refused <= 1; refused++) {
        fst_file *opened = test_open(&file);
        atomic_store(&opened->window, 8 << 10); /* an eighth of the chunks */
        MUST(fsync(opened->fd) == 0);
        MUST(posix_fadvise(opened->fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
        uint64_t cached = size;
        int probe = FST_PROBE_NONE;
        MUST(fst_file_residency(opened, 0, size, &cached, &probe) == FST_OK);
        fst_fill_mode_set(FST_FILL_SMALL);
        CHECK_EQ(fst_fault_set("open", 1, refused ? ALL : 0, EACCES, 0), 0);
        CHECK_EQ(prefetch(&file, opened, &p, 0, true).bytes_skipped, 0);
        if (cached == 0 && probe != FST_PROBE_NONE && fst_page() <= 8 << 10) {
            CHECK(fst_fault_calls("open") > 0);
            CHECK_EQ(fst_fill_mode_get(), refused ? FST_FILL_HUGE : FST_FILL_SMALL);
        }
        fst_fault_clear();
        MUST(fst_file_residency(opened, 0, size, &cached, &probe) == FST_OK);
        if (probe != FST_PROBE_NONE) CHECK_EQ(cached, size);
        fst_file_release(&opened);
    }
    fst_fill_mode_set(FST_FILL_HUGE);
    free_plan(&p);
    test_remove(&file);
}

/* In small pages no byte of a chunk's neighbours is read, by faults or by requests. */
static void test_no_more_than_wanted(void) {
    const uint64_t mib = 1 << 20, size = 32 * mib, begin = 8 * mib, bytes = 8 * mib;
    test_file file = test_create(size, 5);
    fst_file *whole = test_open(&file);
    for (int large = 0; large <= 1; large++) {
        fst_file *opened = test_open(&file);
        fst_job_options options = options_for(0);
        fst_arena *map = NULL;
        fst_job *job = NULL;
        fst_error err = {0};
        fst_segment wanted = {begin, bytes, 0};
        uint64_t before = 0, after = 0, inside = 0;
        int probe = FST_PROBE_NONE;
        if (large) atomic_store(&opened->window, bytes);
        CHECK_EQ(fst_fault_set("preadv2", 1, 0, EIO, 0), 0); /* counts them */
        MUST(fsync(opened->fd) == 0);
        MUST(posix_fadvise(opened->fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
        MUST(fst_arena_map(opened, &map, &err) == FST_OK);
        options.chunk_bytes = bytes;
        fst_fill_mode_set(FST_FILL_SMALL);
        CHECK_EQ(fst_job_prefetch(opened, map, &wanted, 1, &options, &job, &err), FST_OK);
        CHECK_EQ(wait_for(job, &err), FST_OK);
        CHECK_EQ(fst_fill_mode_get(), FST_FILL_SMALL);
        fst_job_release(&job);
        uint64_t touched = fst_fault_calls("preadv2");
        fst_fault_clear();
        MUST(fst_file_residency(opened, 0, begin, &before, &probe) == FST_OK);
        MUST(fst_file_residency(opened, begin + bytes, size - begin - bytes, &after, &probe) ==
             FST_OK);
        MUST(fst_file_residency(opened, begin, bytes, &inside, &probe) == FST_OK);
        if (probe != FST_PROBE_NONE) {
            CHECK_EQ(inside, bytes);
            CHECK_EQ(before, 0);
            CHECK_EQ(after, 0);
        }
        /* The first page, the first window, and a touch of at least one mark. */
        if (large && probe == FST_PROBE_CACHESTAT && fst_file_window(whole) >= bytes)
            CHECK(touched >= 3);
        fst_arena_release(&map);
        fst_file_release(&opened);
    }
    fst_fill_mode_set(FST_FILL_HUGE);
    fst_file_release(&whole);
    test_remove(&file);
}

/* Read-ahead over a file that has shrunk gives up; only a reader would get SIGBUS. */
static void test_prefetch_truncated(void) {
    for (int old_kernel = 0; old_kernel <= 1; old_kernel++) {
        test_file file = test_create(1 << 20, 5);
        plan p = whole_plan(file.size);
        fst_file *opened = test_open(&file);
        MUST(truncate(file.path, 200000) == 0);
        blind_probes();
        if (old_kernel) CHECK_EQ(fst_fault_set("madvise", 1, ALL, EINVAL, 0), 0);
        CHECK(prefetch(&file, opened, &p, 0, false).bytes_skipped > 0);
        fst_fault_clear();
        fst_file_release(&opened);
        free_plan(&p);
        test_remove(&file);
    }
}

int main(void) {
    RUN(test_prefetch);
    RUN(test_prefetch_faults);
    RUN(test_prefetch_limits);
    RUN(test_keep_to);
    RUN(test_areas);
    RUN(test_unprobed);
    RUN(test_read_by_faults);
    RUN(test_no_more_than_wanted);
    RUN(test_prefetch_truncated);
    return test_result();
}
