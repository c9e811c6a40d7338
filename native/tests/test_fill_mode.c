/* test_fill_mode.c - huge pages are left for small ones where those are quicker, and only there. */
#include "test.h"

#include "io/fst_fill_mode.h"

#define MIB (1u << 20)
#define CHUNK (8u << 20)

static bool growing = true;
static uint64_t chunk = CHUNK;

/* Records chunks that take so many milliseconds a MiB, until the mode changes or `most` are. */
static int chunks_until_change(int mode, int most, double milliseconds) {
    for (int i = 1; i <= most; i++) {
        fst_fill_mode_note(mode, growing, chunk, (uint64_t)(milliseconds * 1e6) * (chunk / MIB));
        if (fst_fill_mode_get() != mode) return i;
    }
    return 0;
}

static void test_quick_huge_pages(void) {
    fst_fill_mode_set(FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 5), 0);
}

/* Eight workers that start together wait for each other's requests. */
static void test_slow_start(void) {
    fst_fill_mode_set(FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 4, 50), 0);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 5), 0);
}

static void test_slow_sample_among_quick_ones(void) {
    fst_fill_mode_set(FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 12, 3), 0); /* judged, and half of the next */
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 4, 8), 0);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 3), 0);
}

static void test_slow_huge_pages(void) {
    fst_fill_mode_set(FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 12), 8); /* 32 MiB go by unjudged */
    CHECK_EQ(fst_fill_mode_get(), FST_FILL_TRIAL);
    CHECK_EQ(chunks_until_change(FST_FILL_TRIAL, 1000, 5), 8);
    CHECK_EQ(fst_fill_mode_get(), FST_FILL_SMALL);
    /* After 1 GiB the host may have given memory back. */
    CHECK_EQ(chunks_until_change(FST_FILL_SMALL, 1000, 5), 128);
    CHECK_EQ(fst_fill_mode_get(), FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 12), 8);
    CHECK_EQ(fst_fill_mode_get(), FST_FILL_SMALL); /* without another trial */
}

static void test_slow_storage(void) {
    fst_fill_mode_set(FST_FILL_HUGE);
    (void)chunks_until_change(FST_FILL_HUGE, 1000, 12);
    CHECK_EQ(fst_fill_mode_get(), FST_FILL_TRIAL);
    (void)chunks_until_change(FST_FILL_TRIAL, 1000, 11);
    CHECK_EQ(fst_fill_mode_get(), FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 12), 0); /* and none again */
}

/* Single pages have to gain more before they are tried. */
static void test_single_pages(void) {
    growing = false;
    fst_fill_mode_set(FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 8), 0);
    growing = true;
    fst_fill_mode_set(FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 8), 8);
    growing = false;
    fst_fill_mode_set(FST_FILL_HUGE);
    CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 1000, 12), 8);
    growing = true;
}

/* A chunk that lies across the end of what is skipped is skipped: its bytes do not count either. */
static void test_other_chunks(void) {
    for (chunk = 6 * MIB; chunk <= 31 * MIB; chunk += MIB) {
        fst_fill_mode_set(FST_FILL_HUGE);
        CHECK_EQ(chunks_until_change(FST_FILL_HUGE, 300, 5.9), 0);
        fst_fill_mode_set(FST_FILL_HUGE);
        CHECK(chunks_until_change(FST_FILL_HUGE, 12, 6.1) > 0);
    }
    chunk = CHUNK;
}

static void test_ignored(void) {
    fst_fill_mode_set(FST_FILL_HUGE);
    for (int i = 0; i < 1000; i++) {
        fst_fill_mode_note(FST_FILL_HUGE, true, MIB, UINT64_MAX / 4096);    /* too small a chunk */
        fst_fill_mode_note(FST_FILL_SMALL, true, CHUNK, UINT64_MAX / 4096); /* of another mode */
    }
    CHECK_EQ(fst_fill_mode_get(), FST_FILL_HUGE);
}

int main(void) {
    RUN(test_quick_huge_pages);
    RUN(test_slow_start);
    RUN(test_slow_sample_among_quick_ones);
    RUN(test_slow_huge_pages);
    RUN(test_slow_storage);
    RUN(test_single_pages);
    RUN(test_other_chunks);
    RUN(test_ignored);
    return test_result();
}
