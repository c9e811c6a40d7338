/* test_io_in_place.c - O_DIRECT straight into huge pages, where places allow it: the same bytes
 * or the same error as through a slot.
 */
#include "load.h"

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

static uint64_t mixed_bytes(uint64_t *random) {
    bool large = test_below(random, 3) == 0;
    return large ? 1000000 + test_below(random, 1000000) : some_bytes(random);
}

/* Some segments too small to land in place, and gaps, in chunks with one that is not. */
static void test_in_place_mixed(void) {
    uint64_t random = 21, in_place = 0;
    test_file file = test_create((4 << 20) - 77, 3);
    fst_file *opened = test_open(&file);
    for (int i = 0; i < 40; i++) {
        fst_job_options options = in_place_options((int)(1 + test_below(&random, 4)));
        options.chunk_bytes += test_below(&random, 1 << 20);
        plan p = plan_of(file.size, mixed_bytes, &random);
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

int main(void) {
    if (!test_direct_works()) {
        test_skip("O_DIRECT", "the file system of TMPDIR does not take it");
        return 77;
    }
    RUN(test_in_place);
    RUN(test_in_place_mixed);
    RUN(test_in_place_faults);
    RUN(test_in_place_truncated);
    RUN(test_not_in_place);
    return test_result();
}
