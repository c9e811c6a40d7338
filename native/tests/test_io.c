/* test_io.c - reads give the file's bytes or an error, never anything else, whatever the
 * system calls do.
 */
#include <unistd.h>

#include "base/fst_sys.h"
#include "load.h"

static bool direct_works;

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
    fst_file_release(&opened);
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
    fst_file_release(&opened);
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
            fst_file_release(&opened);
            free_plan(&p);
            test_remove(&file);
        }
    }
}

/* Another process truncates the file while the kernel copies from its last page, which is cleared
 * then: the read returns all bytes, and some of them are zeros. */
#define LAST_CHUNK (256 << 10)

static fst_sys_table cutting;
static const fst_sys_table *uncut;
static const test_file *cut;

static void cut_in_a_read(void *to, ssize_t got, off_t offset) {
    if (offset < LAST_CHUNK) return;
    MUST(truncate(cut->path, offset + 1) == 0);
    memset((char *)to + 1, 0, (size_t)got - 1);
}

static ssize_t cutting_preadv(int fd, const struct iovec *to, int count, off_t offset) {
    ssize_t got = uncut->preadv(fd, to, 1, offset);
    (void)count;
    cut_in_a_read(to->iov_base, got, offset);
    return got;
}

static ssize_t cutting_pread(int fd, void *to, size_t bytes, off_t offset) {
    ssize_t got = uncut->pread(fd, to, bytes, offset);
    cut_in_a_read(to, got, offset);
    return got;
}

static void test_truncated_in_a_read(void) {
    for (int mode = BUFFERED; mode <= (direct_works ? DIRECT : BUFFERED); mode++) {
        test_file file = test_create(300000, 5);
        plan p = whole_plan(file.size);
        fst_job_options options = options_for(mode);
        options.threads = 1; /* the others would meet the new end */
        uncut = FST_SYS;
        cutting = *uncut;
        cutting.preadv = cutting_preadv;
        cutting.pread = cutting_pread;
        cut = &file;
        fst_file *opened = test_open(&file);
        atomic_store(&fst_sys_in_force, &cutting);
        load_result r = load_open(opened, &file, &p, &options);
        atomic_store(&fst_sys_in_force, uncut);
        CHECK_EQ(r.code, FST_E_TRUNCATED);
        CHECK(strstr(r.err.message, file.path) != NULL);
        fst_file_release(&opened);
        free_plan(&p);
        test_remove(&file);
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
    RUN(test_again_forever);
    if (direct_works) RUN(test_replaced_file);
    RUN(test_truncated);
    RUN(test_truncated_in_a_read);
    RUN(test_drop_cache);
    return test_result();
}
