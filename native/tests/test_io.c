/* test_io.c - reads give the file's bytes or an error, never anything else, whatever the
 * system calls do.
 */
#include "plan.h"

#define CANARY 0xEE

static bool direct_works;

/* ---- one load ---- */

typedef struct load_result {
    int code;
    fst_error err;
    fst_job_stats stats;
} load_result;

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

static load_result load_into(fst_arena *arena, fst_file *opened, const test_file *file,
                             const plan *p, const fst_job_options *options) {
    load_result result = {0};
    fst_job *job = NULL;
    unsigned char *memory = fst_arena_data(arena);
    memset(memory, CANARY, p->arena_bytes);
    result.code = fst_job_read(opened, arena, p->segments, p->count, options, &job, &result.err);
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
    return result;
}

/* Into malloc'ed memory of the exact size: ASan sees what lies beside it. */
static load_result load_open(fst_file *opened, const test_file *file, const plan *p,
                             const fst_job_options *options) {
    fst_error err = {0};
    fst_arena *arena = NULL;
    unsigned char *memory = malloc(p->arena_bytes + 1);
    MUST(memory != NULL);
    MUST(fst_arena_borrow(memory, p->arena_bytes, &arena, &err) == FST_OK);
    load_result result = load_into(arena, opened, file, p, options);
    fst_arena_release(arena);
    free(memory);
    return result;
}

/* Into huge pages, where O_DIRECT may read in place. */
static load_result load_huge(fst_file *opened, const test_file *file, const plan *p,
                             const fst_job_options *options) {
    fst_error err = {0};
    fst_arena *arena = NULL;
    MUST(fst_arena_alloc(p->arena_bytes, &arena, &err) == FST_OK);
    load_result result = load_into(arena, opened, file, p, options);
    fst_arena_release(arena);
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
    if (strcmp(c->call, "madvise") == 0) options.chunk_bytes = 2u << 20; /* less asks for none */
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

/* ---- O_DIRECT in place ---- */

#define IN_PLACE_CHUNK ((1u << 20) + (64u << 10)) /* pieces of 1 MiB land in place */

static fst_job_options in_place_options(int threads) {
    fst_job_options options = options_for(DIRECT);
    options.threads = threads;
    options.chunk_bytes = IN_PLACE_CHUNK;
    return options;
}

static void count_calls(const char *call) { CHECK_EQ(fst_fault_set(call, ALL, 1, EIO, 0), 0); }

static plan shifted_plan(uint64_t begin, uint64_t end, uint64_t arena_offset) {
    plan p = whole_plan(end - begin);
    p.segments[0].file_offset = begin;
    p.segments[0].arena_offset = arena_offset;
    p.arena_bytes += arena_offset + 5000;
    return p;
}

/* Every kind of distance between a block's place in the file and in memory, with odd first and
 * last blocks; what lies beside the chunks, and beside all of them, stays as it was. */
static void test_in_place(void) {
    static const uint64_t begins[] = {0, 8, 504, 513, 2049, 4095, 4096 + 256};
    static const uint64_t places[] = {0, 1, 256, 511, 2047, 2048, 2049, 4095, 4096, 12800};
    static const uint64_t short_of[] = {0, 1, 511, 777, 4096, 4873};
    test_file file = test_create((3 << 20) + 777, 3);
    fst_file *opened = test_open(&file);
    fst_job_options options = in_place_options(3);
    for (size_t i = 0; i < sizeof begins / sizeof *begins; i++)
        for (size_t k = 0; k < sizeof places / sizeof *places; k++) {
            plan p = shifted_plan(begins[i], file.size - short_of[(i + k) % 6], places[k]);
            count_calls("pread");
            count_calls("preadv");
            load_result r = load_huge(opened, &file, &p, &options);
            CHECK_EQ(r.code, FST_OK);
            CHECK_EQ(r.stats.bytes_direct, p.bytes);
            CHECK_EQ(fst_fault_calls("preadv"), 2);
            CHECK_EQ(fst_fault_calls("pread"), 1); /* the last chunk is too small */
            fst_fault_clear();
            free_plan(&p);
        }
    fst_file_release(opened);
    test_remove(&file);
}

/* Some segments too small to land in place, and gaps, in chunks with one that is not. */
static plan mixed_plan(uint64_t file_bytes, uint64_t *random) {
    plan p = {.segments = calloc(256, sizeof *p.segments)};
    MUST(p.segments != NULL);
    for (uint64_t at = some_gap(random); at < file_bytes && p.count < 256;) {
        bool large = test_below(random, 3) == 0;
        uint64_t bytes = large ? 1000000 + test_below(random, 1000000) : some_bytes(random);
        if (bytes > file_bytes - at) bytes = file_bytes - at;
        p.segments[p.count++] = (fst_segment){at, bytes, 0};
        p.bytes += bytes;
        at += bytes + some_gap(random);
    }
    place(&p, random);
    return p;
}

static void test_in_place_mixed(void) {
    uint64_t random = 21, in_place = 0;
    test_file file = test_create((4 << 20) - 77, 3);
    fst_file *opened = test_open(&file);
    for (int i = 0; i < 40; i++) {
        fst_job_options options = in_place_options((int)(1 + test_below(&random, 4)));
        options.chunk_bytes += test_below(&random, 1 << 20);
        plan p = mixed_plan(file.size, &random);
        count_calls("preadv");
        load_result r = load_huge(opened, &file, &p, &options);
        in_place += fst_fault_calls("preadv");
        fst_fault_clear();
        CHECK_EQ(r.code, FST_OK);
        CHECK_EQ(r.stats.bytes_direct, p.bytes);
        free_plan(&p);
    }
    CHECK(in_place > 20);
    fst_file_release(opened);
    test_remove(&file);
}

/* Whatever happens in place, the slot gets its turn: the second fault is its. */
static const struct {
    fault_case in_place;
    fault_case slot;
} in_place_faults[] = {
#define FAULT(what, sys_errno, bytes) {what, DIRECT, "preadv", 1, ALL, sys_errno, bytes, FST_OK, 0}
#define NONE {"", DIRECT, "pread", ALL, 1, EIO, 0, FST_OK, 0}
    {FAULT("memory refused", EINVAL, 0), NONE},
    {FAULT("not supported", EOPNOTSUPP, 0), NONE},
    {FAULT("EINTR", EINTR, 0), NONE},
    {FAULT("EAGAIN", EAGAIN, 0), NONE},
    {FAULT("EIO once", EIO, 0), NONE},
    {FAULT("no memory", EFAULT, 0), NONE},
    {FAULT("nothing", 0, 0), NONE},
    {FAULT("short, within the first block", 0, 700), NONE},
    {FAULT("short, after the first block", 0, 4096), NONE},
    {FAULT("short, in the middle", 0, 500001), NONE},
    {FAULT("short, before the last block", 0, IN_PLACE_CHUNK - 4096), NONE},
    {FAULT("short, by a byte", 0, IN_PLACE_CHUNK - 1), NONE},
    {FAULT("short, EINTR", 0, 500001), {"", DIRECT, "pread", 1, 10, EINTR, 0, FST_OK, 0}},
    {FAULT("EAGAIN twice", EAGAIN, 0), {"", DIRECT, "pread", 1, 1, EAGAIN, 0, FST_OK, 0}},
    {FAULT("short, short", 0, 500001), {"", DIRECT, "pread", 1, ALL, 0, 4096, FST_OK, 0}},
    {FAULT("EIO", EIO, 0), {"", DIRECT, "pread", 1, 1, EIO, 0, FST_E_SYS, 0}},
    {FAULT("short, EIO", 0, 4096), {"", DIRECT, "pread", 3, 1, EIO, 0, FST_E_SYS, 0}},
    {FAULT("truncated", 0, 8192), {"", DIRECT, "pread", 2, 1, 0, 0, FST_E_TRUNCATED, 0}},
    {{"O_DIRECT refused", DIRECT, "preadv", 1, 1, EINVAL, 0, FST_OK, 0},
     {"", DIRECT, "pread", 1, ALL, EINVAL, 0, FST_OK, EINVAL}},
    {{"O_DIRECT refused later", DIRECT, "preadv", 2, 1, EINVAL, 0, FST_OK, 0},
     {"", DIRECT, "pread", 1, ALL, EINVAL, 0, FST_OK, EINVAL}},
#undef FAULT
#undef NONE
};

static void test_in_place_faults(void) {
    test_file file = test_create((4 << 20) - 77, 3);
    fst_file *opened = test_open(&file);
    plan p = shifted_plan(504, file.size, 256);
    fst_job_options options = in_place_options(1); /* so that calls come in order */
    for (size_t i = 0; i < sizeof in_place_faults / sizeof *in_place_faults; i++) {
        const fault_case *first = &in_place_faults[i].in_place, *then = &in_place_faults[i].slot;
        test_case = first->what;
        CHECK_EQ(fst_fault_set(first->call, first->first, first->count, first->sys_errno,
                               first->short_bytes),
                 0);
        CHECK_EQ(
            fst_fault_set(then->call, then->first, then->count, then->sys_errno, then->short_bytes),
            0);
        load_result r = load_huge(opened, &file, &p, &options);
        CHECK_EQ(r.code, then->code);
        CHECK_EQ(r.stats.direct_errno, then->direct_errno);
        if (r.code == FST_E_SYS) CHECK_EQ(r.err.sys_errno, then->sys_errno);
        if (r.code != FST_OK) CHECK(strstr(r.err.message, "offset") != NULL);
        if (then->direct_errno == 0) { /* else the page cache, read with preadv, took over */
            CHECK_EQ(fst_fault_calls("preadv"), 1); /* it was not tried again */
            if (r.code == FST_OK) CHECK_EQ(r.stats.bytes_direct, p.bytes);
        }
        fst_fault_clear();
    }
    fst_file_release(opened);
    free_plan(&p);
    test_remove(&file);
}

static void test_in_place_truncated(void) {
    static const uint64_t sizes[] = {0, 5000, 1 << 20, (2 << 20) + 511, (4 << 20) - 78};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        test_file file = test_create((4 << 20) - 77, 3);
        fst_file *opened = test_open(&file);
        plan p = shifted_plan(504, file.size, 0);
        fst_job_options options = in_place_options(2);
        MUST(truncate(file.path, (off_t)sizes[i]) == 0);
        load_result r = load_huge(opened, &file, &p, &options);
        CHECK_EQ(r.code, FST_E_TRUNCATED);
        fst_file_release(opened);
        free_plan(&p);
        test_remove(&file);
    }
}

/* Small pages, or somebody else's: the slot's huge ones are quicker. */
static void test_not_in_place(void) {
    test_file file = test_create((4 << 20) - 77, 3);
    fst_file *opened = test_open(&file);
    plan borrowed = shifted_plan(504, file.size, 0), small = shifted_plan(0, 1500000, 0);
    fst_job_options options = in_place_options(2);
    count_calls("preadv");
    CHECK_EQ(load_open(opened, &file, &borrowed, &options).code, FST_OK);
    CHECK_EQ(load_huge(opened, &file, &small, &options).code, FST_OK);
    CHECK_EQ(fst_fault_calls("preadv"), 0);
    fst_file_release(opened);
    free_plan(&borrowed);
    free_plan(&small);
    test_remove(&file);
}

/* ---- more that may happen to a file ---- */

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
        CHECK_EQ(fst_fault_calls("fadvise"), mode == DIRECT ? 1 : 17);
        fst_fault_clear();
    }
    free_plan(&p);
    test_remove(&file);
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
    if (direct_works) {
        RUN(test_in_place);
        RUN(test_in_place_mixed);
        RUN(test_in_place_faults);
        RUN(test_in_place_truncated);
        RUN(test_not_in_place);
    }
    RUN(test_again_forever);
    if (direct_works) RUN(test_replaced_file);
    RUN(test_truncated);
    RUN(test_drop_cache);
    return test_result();
}
