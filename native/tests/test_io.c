/* test_io.c - reads give the file's bytes or an error, never anything else, whatever the
 * system calls do.
 */
#include "test.h"

#include <sys/mman.h>

#define CANARY 0xEE

static bool direct_works;

/* ---- what to read, and where it goes ---- */

typedef struct plan {
    fst_segment *segments;
    uint64_t count;
    uint64_t bytes; /* of all segments */
    uint64_t arena_bytes;
} plan;

static uint64_t some_bytes(uint64_t *random) {
    switch (test_below(random, 5)) {
    case 0:
        return 0;
    case 1:
        return 1 + test_below(random, 100);
    case 2:
        return 4000 + test_below(random, 200);
    case 3:
        return 65400 + test_below(random, 300);
    default:
        return test_below(random, 400000);
    }
}

/* Gaps are mostly none or small, sometimes larger than what is read over. */
static uint64_t some_gap(uint64_t *random) {
    switch (test_below(random, 6)) {
    case 0:
        return 1 + test_below(random, 100);
    case 1:
        return 65530 + test_below(random, 12);
    case 2:
        return test_below(random, 200000);
    default:
        return 0;
    }
}

/* Ordered by file offset, but in any order in memory, with unused bytes between. */
static void place(plan *p, uint64_t *random) {
    uint64_t at = test_below(random, 50);
    bool backwards = test_below(random, 2) == 1;
    for (uint64_t i = 0; i < p->count; i++) {
        fst_segment *s = &p->segments[backwards ? p->count - 1 - i : i];
        s->arena_offset = at;
        at += s->bytes + (test_below(random, 2) ? test_below(random, 300) : 0);
    }
    p->arena_bytes = at;
}

static plan random_plan(uint64_t file_bytes, uint64_t *random) {
    plan p = {.segments = calloc(256, sizeof *p.segments)};
    MUST(p.segments != NULL);
    for (uint64_t at = some_gap(random); at < file_bytes && p.count < 256;) {
        uint64_t bytes = some_bytes(random);
        if (bytes > file_bytes - at) bytes = file_bytes - at;
        p.segments[p.count++] = (fst_segment){at, bytes, 0};
        p.bytes += bytes;
        at += bytes + some_gap(random);
    }
    place(&p, random);
    return p;
}

static plan whole_plan(uint64_t file_bytes) {
    plan p = {.segments = calloc(1, sizeof *p.segments),
              .count = 1,
              .bytes = file_bytes,
              .arena_bytes = file_bytes};
    MUST(p.segments != NULL);
    p.segments[0].bytes = file_bytes;
    return p;
}

static void free_plan(plan *p) { free(p->segments); }

/* ---- one load ---- */

typedef struct load_result {
    int code;
    fst_error err;
    fst_job_stats stats;
} load_result;

static fst_job_options options_for(int mode) {
    return (fst_job_options){.struct_bytes = sizeof(fst_job_options),
                             .threads = 3,
                             .chunk_bytes = 64 << 10,
                             .mode = mode};
}

static int wait_for(fst_job *job, fst_error *err) {
    int code;
    while ((code = fst_job_wait(job, 1000, err)) == FST_PENDING) {
    }
    return code;
}

/* What a file holds; made once for the file in use, since sanitizers make loops slow. */
static const unsigned char *content_of(const test_file *file) {
    static unsigned char content[4 << 20];
    static uint64_t size, salt = UINT64_MAX;
    MUST(file->size <= sizeof content);
    if (file->salt != salt || file->size > size)
        for (uint64_t i = 0; i < file->size; i++) content[i] = test_byte(i, file->salt);
    size = file->salt == salt && size > file->size ? size : file->size;
    salt = file->salt;
    return content;
}

/* All bytes of a finished load are the file's; nothing else was ever written to. */
static void check_memory(const test_file *file, const plan *p, const unsigned char *memory,
                         bool complete) {
    const unsigned char *content = content_of(file);
    unsigned char *wanted = malloc(p->arena_bytes + 1);
    MUST(wanted != NULL);
    memset(wanted, CANARY, p->arena_bytes);
    for (uint64_t i = 0; i < p->count; i++) {
        const fst_segment *s = &p->segments[i];
        memcpy(wanted + s->arena_offset,
               complete ? content + s->file_offset : memory + s->arena_offset, s->bytes);
    }
    CHECK(memcmp(memory, wanted, p->arena_bytes) == 0);
    free(wanted);
}

/* Into malloc'ed memory of the exact size: ASan sees what lies beside it. */
static load_result load_open(fst_file *opened, const test_file *file, const plan *p,
                             const fst_job_options *options) {
    load_result result = {0};
    fst_arena *arena = NULL;
    fst_job *job = NULL;
    unsigned char *memory = malloc(p->arena_bytes + 1);
    MUST(memory != NULL);
    memset(memory, CANARY, p->arena_bytes);
    MUST(fst_arena_borrow(memory, p->arena_bytes, &arena, &result.err) == FST_OK);
    result.code = fst_job_read(opened, arena, p->segments, p->count, options, &job, &result.err);
    fst_arena_release(arena); /* the job holds it */
    if (job != NULL) {
        result.code = wait_for(job, &result.err);
        fst_job_get_stats(job, &result.stats);
        CHECK(result.stats.done);
        CHECK_EQ(result.stats.bytes_total, p->bytes);
        CHECK_EQ(result.stats.bytes_done + result.stats.bytes_skipped, p->bytes);
        if (result.code == FST_OK) CHECK_EQ(result.stats.bytes_done, p->bytes);
    }
    plan nothing = {.arena_bytes = p->arena_bytes}; /* what a refused job may write to */
    const plan *touched = job == NULL ? &nothing : p;
    fst_job_release(job);
    check_memory(file, touched, memory, result.code == FST_OK);
    free(memory);
    return result;
}

static load_result load(const test_file *file, const plan *p, const fst_job_options *options) {
    fst_file *opened = test_open(file);
    load_result result = load_open(opened, file, p, options);
    fst_file_release(opened);
    return result;
}

/* ---- without faults ---- */

static void check_random(int mode) {
    uint64_t random = 7;
    static const uint64_t chunks[] = {64 << 10, (64 << 10) + 1, 100000, 256 << 10, 4 << 20};
    test_file file = test_create((3 << 20) + 777, 3);
    for (int i = 0; i < 40; i++) {
        fst_job_options options = options_for(mode);
        options.chunk_bytes = chunks[test_below(&random, 5)];
        options.threads = (int32_t)(1 + test_below(&random, 8));
        options.drop_cache = test_below(&random, 3) == 0;
        plan p = random_plan(file.size, &random);
        load_result r = load(&file, &p, &options);
        if (!CHECK_EQ(r.code, FST_OK)) (void)fprintf(stderr, "  %s\n", r.err.message);
        CHECK_EQ(r.stats.direct_errno, 0);
        CHECK_EQ(r.stats.bytes_direct, mode == FST_READ_DIRECT ? p.bytes : 0);
        free_plan(&p);
    }
    test_remove(&file);
}

static void test_buffered(void) { check_random(FST_READ_BUFFERED); }

static void test_direct(void) { check_random(FST_READ_DIRECT); }

/* Files that end anywhere in a block, read to their last byte. */
static void test_tails(void) {
    static const uint64_t sizes[] = {1,    511,  512,   513,   4095,
                                     4096, 4097, 65535, 65537, (1 << 20) + 13};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        test_file file = test_create(sizes[i], i);
        plan p = whole_plan(file.size);
        for (int mode = FST_READ_BUFFERED; mode <= FST_READ_DIRECT; mode++) {
            fst_job_options options = options_for(mode);
            CHECK_EQ(load(&file, &p, &options).code, FST_OK);
        }
        free_plan(&p);
        test_remove(&file);
    }
}

static void test_nothing_to_read(void) {
    test_file file = test_create(100, 1);
    plan p = whole_plan(0);
    fst_job_options options = options_for(FST_READ_DIRECT);
    CHECK_EQ(load(&file, &p, &options).code, FST_OK); /* one empty segment */
    p.count = 0;
    CHECK_EQ(load(&file, &p, &options).code, FST_OK);
    p.count = 1;
    p.segments[0].file_offset = 100; /* empty, at the very end */
    CHECK_EQ(load(&file, &p, &options).code, FST_OK);
    free_plan(&p);
    test_remove(&file);
}

static void check_refused(const test_file *file, const fst_segment *segments, uint64_t count,
                          const fst_job_options *options) {
    plan p = {(fst_segment *)(uintptr_t)segments, count, 0, 1000};
    load_result r = load(file, &p, options);
    CHECK_EQ(r.code, FST_E_INVALID);
    CHECK(r.err.message[0] != '\0');
}

static void test_bad_arguments(void) {
    test_file file = test_create(1000, 1);
    fst_job_options good = options_for(FST_READ_BUFFERED), bad;
    static const fst_segment fine[] = {{0, 10, 0}};
    bad = good, bad.struct_bytes--, check_refused(&file, fine, 1, &bad);
    bad = good, bad.threads = 0, check_refused(&file, fine, 1, &bad);
    bad = good, bad.threads = 65, check_refused(&file, fine, 1, &bad);
    bad = good, bad.threads = -1, check_refused(&file, fine, 1, &bad);
    bad = good, bad.chunk_bytes = (64 << 10) - 1, check_refused(&file, fine, 1, &bad);
    bad = good, bad.chunk_bytes = (64 << 20) + 1, check_refused(&file, fine, 1, &bad);
    check_refused(&file, fine, UINT64_MAX, &good);
    /* clang-format off */
    static const fst_segment wrong[][2] = {
        {{0, 10, 0}, {9, 10, 10}},          /* overlap in the file */
        {{10, 10, 0}, {0, 10, 10}},         /* out of order */
        {{0, 10, 0}, {991, 10, 10}},        /* beyond the file */
        {{0, 10, 0}, {1001, 0, 10}},
        {{0, 10, 0}, {500, UINT64_MAX, 10}},
        {{0, 10, 0}, {UINT64_MAX, 2, 10}},
        {{0, 10, 0}, {10, 10, 991}},        /* beyond the arena */
        {{0, 10, 0}, {10, 10, UINT64_MAX}},
        {{0, 10, 0}, {10, 0, 1001}},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        check_refused(&file, wrong[i], 2, &good);
    test_remove(&file);
}

/* ---- faults while reading ---- */

typedef struct fault_case {
    const char *what;
    int mode;
    const char *call;
    uint64_t first, count;
    int sys_errno; /* 0: cut short */
    uint64_t short_bytes;
    int code; /* expected */
    int direct_errno;
} fault_case;

#define ALL UINT64_MAX
#define BUFFERED FST_READ_BUFFERED
#define DIRECT FST_READ_DIRECT

static const fault_case faults[] = {
    {"short, odd", BUFFERED, "preadv", 1, ALL, 0, 4097, FST_OK, 0},
    {"short, 100 bytes, sometimes", BUFFERED, "preadv", 3, 40, 0, 100, FST_OK, 0},
    {"EINTR", BUFFERED, "preadv", 2, 500, EINTR, 0, FST_OK, 0},
    {"EAGAIN", BUFFERED, "preadv", 2, 20, EAGAIN, 0, FST_OK, 0},
    {"EIO at once", BUFFERED, "preadv", 1, ALL, EIO, 0, FST_E_SYS, 0},
    {"EIO later", BUFFERED, "preadv", 5, 1, EIO, 0, FST_E_SYS, 0},
    {"ENOMEM", BUFFERED, "preadv", 2, 1, ENOMEM, 0, FST_E_SYS, 0},
    {"end of file", BUFFERED, "preadv", 4, 1, 0, 0, FST_E_TRUNCATED, 0},
    {"no readahead", BUFFERED, "readahead", 1, ALL, EINVAL, 0, FST_OK, 0},
    {"no cachestat", BUFFERED, "cachestat", 1, ALL, ENOSYS, 0, FST_OK, 0},
    {"no cachestat for us", BUFFERED, "cachestat", 1, ALL, EPERM, 0, FST_OK, 0},
    {"no thread", BUFFERED, "pthread_create", 1, ALL, EAGAIN, 0, FST_OK, 0},
    {"one thread", BUFFERED, "pthread_create", 2, ALL, EAGAIN, 0, FST_OK, 0},
    {"refused at open", DIRECT, "open", 1, ALL, EINVAL, 0, FST_OK, EINVAL},
    {"no descriptor", DIRECT, "open", 1, ALL, EMFILE, 0, FST_OK, EMFILE},
    {"no /proc", DIRECT, "open", 1, 1, ENOENT, 0, FST_OK, 0},
    {"no /proc, gone from its path", DIRECT, "open", 1, ALL, ENOENT, 0, FST_OK, ENOENT},
    {"refused at the first read", DIRECT, "pread", 1, ALL, EINVAL, 0, FST_OK, EINVAL},
    {"refused later", DIRECT, "pread", 7, ALL, EINVAL, 0, FST_OK, EINVAL},
    {"refused once", DIRECT, "pread", 4, 1, ENOTSUP, 0, FST_OK, ENOTSUP},
    {"short, a block", DIRECT, "pread", 1, ALL, 0, 4096, FST_OK, 0},
    {"short, a sector less", DIRECT, "pread", 1, ALL, 0, 65536 - 512, FST_OK, 0},
    {"short, odd", DIRECT, "pread", 1, ALL, 0, 5001, FST_OK, 0},
    {"short, within the first block", DIRECT, "pread", 1, ALL, 0, 700, FST_OK, EINVAL},
    {"short, sometimes", DIRECT, "pread", 3, 6, 0, 700, FST_OK, 0},
    {"EINTR", DIRECT, "pread", 2, 500, EINTR, 0, FST_OK, 0},
    {"EAGAIN", DIRECT, "pread", 2, 20, EAGAIN, 0, FST_OK, 0},
    {"EIO at once", DIRECT, "pread", 1, ALL, EIO, 0, FST_E_SYS, 0},
    {"EIO later", DIRECT, "pread", 5, 1, EIO, 0, FST_E_SYS, 0},
    {"ENOMEM", DIRECT, "pread", 2, 1, ENOMEM, 0, FST_E_SYS, 0},
    {"end of file", DIRECT, "pread", 4, 1, 0, 0, FST_E_TRUNCATED, 0},
    {"no thread", DIRECT, "pthread_create", 1, ALL, EAGAIN, 0, FST_OK, 0},
    {"one thread", DIRECT, "pthread_create", 2, ALL, EAGAIN, 0, FST_OK, 0},
    {"no read buffer", DIRECT, "mmap", 1, ALL, ENOMEM, 0, FST_E_NOMEM, 0},
    {"no second read buffer", DIRECT, "mmap", 2, ALL, ENOMEM, 0, FST_E_NOMEM, 0},
    {"no huge pages", DIRECT, "madvise", 1, ALL, EINVAL, 0, FST_OK, 0},
};

/* The sum of two faults is covered by "refused" plus these in the fallback. */
static const fault_case fallback_faults[] = {
    {"EIO in the fallback", DIRECT, "preadv", 1, ALL, EIO, 0, FST_E_SYS, EINVAL},
    {"short in the fallback", DIRECT, "preadv", 1, ALL, 0, 999, FST_OK, EINVAL},
    {"truncated in the fallback", DIRECT, "preadv", 2, 1, 0, 0, FST_E_TRUNCATED, EINVAL},
};

static void check_fault(const test_file *file, const plan *p, const fault_case *c, bool refused) {
    fst_job_options options = options_for(c->mode);
    fst_file *opened = test_open(file);
    test_case = c->what;
    if (refused) CHECK_EQ(fst_fault_set("pread", 1, ALL, EINVAL, 0), 0);
    CHECK_EQ(fst_fault_set(c->call, c->first, c->count, c->sys_errno, c->short_bytes), 0);
    load_result r = load_open(opened, file, p, &options);
    /* With one thread there is no second buffer, and nothing fails. */
    bool met = fst_fault_calls(c->call) >= c->first;
    CHECK(met || strcmp(c->call, "mmap") == 0 || strcmp(c->call, "readahead") == 0);
    fst_fault_clear();
    if (met) CHECK_EQ(r.code, c->code);
    CHECK_EQ(r.stats.direct_errno, c->direct_errno);
    if (c->mode == DIRECT && r.code == FST_OK && c->direct_errno == 0)
        CHECK_EQ(r.stats.bytes_direct, p->bytes);
    if (r.code == FST_E_SYS) CHECK_EQ(r.err.sys_errno, c->sys_errno);
    if (r.code == FST_E_SYS || r.code == FST_E_TRUNCATED)
        CHECK(strstr(r.err.message, file->path) != NULL && strstr(r.err.message, "offset") != NULL);
    fst_file_release(opened);
    fst_pool_shutdown(); /* so that each case starts its own threads and buffers */
}

static void test_read_faults(void) {
    uint64_t random = 99;
    test_file file = test_create((1 << 20) + 4321, 5);
    for (int round = 0; round < 3; round++) {
        plan p = round == 0 ? whole_plan(file.size) : random_plan(file.size, &random);
        while (p.bytes < file.size / 2) { /* so that every fault is met */
            free_plan(&p);
            p = random_plan(file.size, &random);
        }
        for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
            if (faults[i].mode == BUFFERED || direct_works)
                check_fault(&file, &p, &faults[i], false);
        for (size_t i = 0; i < sizeof fallback_faults / sizeof *fallback_faults && direct_works;
             i++)
            check_fault(&file, &p, &fallback_faults[i], true);
        free_plan(&p);
    }
    test_remove(&file);
}

/* A storage that never has bytes: an error after a second, not an endless loop. */
static void test_again_forever(void) {
    test_file file = test_create(1000, 5);
    plan p = whole_plan(file.size);
    for (int mode = BUFFERED; mode <= (direct_works ? DIRECT : BUFFERED); mode++) {
        fst_job_options options = options_for(mode);
        CHECK_EQ(fst_fault_set(mode == DIRECT ? "pread" : "preadv", 1, ALL, EAGAIN, 0), 0);
        load_result r = load(&file, &p, &options);
        CHECK(r.code == FST_E_SYS && r.err.sys_errno == EAGAIN);
        fst_fault_clear();
    }
    free_plan(&p);
    test_remove(&file);
}

/* No /proc, and another file by now where ours was: its bytes must not come in. */
static void test_replaced_file(void) {
    test_file file = test_create(300000, 5), other = test_create(300000, 6);
    plan p = whole_plan(file.size);
    fst_job_options options = options_for(DIRECT);
    fst_file *opened = test_open(&file);
    MUST(rename(other.path, file.path) == 0);
    CHECK_EQ(fst_fault_set("open", 1, 1, ENOENT, 0), 0);
    load_result r = load_open(opened, &file, &p, &options);
    CHECK_EQ(r.code, FST_OK);
    CHECK_EQ(r.stats.direct_errno, ESTALE);
    fst_file_release(opened);
    free_plan(&p);
    test_remove(&file);
}

static void test_truncated(void) {
    static const uint64_t sizes[] = {0, 1, 100000, 131072, 262144 + 511};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int mode = BUFFERED; mode <= DIRECT; mode++) {
            test_file file = test_create(300000, 5);
            plan p = whole_plan(file.size);
            fst_job_options options = options_for(mode);
            fst_file *opened = test_open(&file);
            MUST(truncate(file.path, (off_t)sizes[i]) == 0);
            load_result r = load_open(opened, &file, &p, &options);
            CHECK_EQ(r.code, FST_E_TRUNCATED);
            CHECK(strstr(r.err.message, file.path) != NULL);
            fst_file_release(opened);
            free_plan(&p);
            test_remove(&file);
        }
    }
}

static void test_drop_cache(void) {
    test_file file = test_create(1 << 20, 5);
    plan p = whole_plan(file.size);
    for (int mode = BUFFERED; mode <= (direct_works ? DIRECT : BUFFERED); mode++) {
        fst_job_options options = options_for(mode);
        options.drop_cache = 1;
        CHECK_EQ(fst_fault_set("fadvise", 1, ALL, EINVAL, 0), 0); /* a wish, not a condition */
        CHECK_EQ(load(&file, &p, &options).code, FST_OK);
        CHECK_EQ(fst_fault_calls("fadvise"), mode == DIRECT ? 1 : 16);
        fst_fault_clear();
    }
    free_plan(&p);
    test_remove(&file);
}

/* ---- read-ahead ---- */

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
    fst_job_release(job);
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
    fst_arena_release(map);
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
    fst_file_release(opened);
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
    fst_file_release(opened);
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
    fst_arena_release(memory);
    fst_arena_release(map);
    fst_file_release(opened);
    fst_file_release(wrong);
    free_plan(&p);
    test_remove(&file);
    test_remove(&other);
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
        fst_file_release(opened);
        free_plan(&p);
        test_remove(&file);
    }
}

int main(void) {
    direct_works = test_direct_works();
    RUN(test_buffered);
    if (direct_works)
        RUN(test_direct);
    else
        test_skip("O_DIRECT", "the file system of TMPDIR does not take it");
    RUN(test_tails);
    RUN(test_nothing_to_read);
    RUN(test_bad_arguments);
    RUN(test_read_faults);
    RUN(test_again_forever);
    if (direct_works) RUN(test_replaced_file);
    RUN(test_truncated);
    RUN(test_drop_cache);
    RUN(test_prefetch);
    RUN(test_prefetch_faults);
    RUN(test_prefetch_limits);
    RUN(test_prefetch_truncated);
    return test_result();
}
