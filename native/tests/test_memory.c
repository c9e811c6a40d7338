/* test_memory.c - how much memory is said to be left, and in which pages it is taken. */
#include "test.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

#include "tensor/fst_arena.h"

static void test_headroom(void) {
    struct sysinfo machine;
    MUST(sysinfo(&machine) == 0);
    uint64_t all = (uint64_t)machine.totalram * machine.mem_unit;
    uint64_t headroom = fst_memory_headroom();
    if (headroom == UINT64_MAX) {
        test_skip("headroom", "neither /proc/meminfo nor a cgroup tells");
        return;
    }
    CHECK(headroom > 0 && headroom <= all);
}

static void test_headroom_repeats(void) { /* and leaks no descriptor */
    for (int i = 0; i < 100; i++) CHECK(fst_memory_headroom() > 0);
}

#define HUGE (2u << 20)

static unsigned char *anonymous(uint64_t bytes) { /* and aligned to a huge page */
    void *map =
        mmap(NULL, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(map != MAP_FAILED);
    return (unsigned char *)map + (HUGE - (uintptr_t)map % HUGE) % HUGE;
}

static bool touched(unsigned char *page) {
    unsigned char in_memory = 0;
    MUST(mincore(page, 1, &in_memory) == 0);
    return in_memory & 1;
}

static void test_huge_fills_whole_pages_only(void) {
    unsigned char *data = anonymous(4 * HUGE);
    data[HUGE + 7] = 7;
    CHECK(fst_memory_huge(data + 4096, 3 * HUGE, 1) != UINT64_MAX); /* of four it has two whole */
    CHECK(!touched(data) && !touched(data + HUGE - 4096) && !touched(data + 3 * HUGE));
    CHECK(touched(data + HUGE) && touched(data + 3 * HUGE - 4096));
    CHECK_EQ(data[HUGE + 7], 7);
    CHECK_EQ(data[2 * HUGE], 0);
}

static void test_huge_advice_takes_nothing(void) {
    unsigned char *data = anonymous(2 * HUGE);
    CHECK(fst_memory_huge(data, 2 * HUGE, 0) != UINT64_MAX);
    CHECK(!touched(data) && !touched(data + HUGE));
}

static void test_huge_of_less_than_a_page(void) {
    unsigned char *data = anonymous(2 * HUGE);
    CHECK_EQ(fst_fault_set("madvise", 1, UINT64_MAX, EINVAL, 0), 0); /* it is not even called */
    CHECK_EQ(fst_memory_huge(data + 1, 2 * HUGE - 2, 1), 0);
    CHECK_EQ(fst_memory_huge(data, 0, 1), 0);
    fst_fault_clear();
    CHECK_EQ(fst_memory_huge(data, UINT64_MAX, 1), UINT64_MAX);
}

static void test_huge_refused(void) {
    unsigned char *data = anonymous(2 * HUGE);
    static const struct {
        uint64_t call;
        int error;
        bool refused;
    } cases[] = {{1, EINVAL, true}, {2, EINVAL, true}, {2, ENOMEM, true}, {2, EINTR, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK_EQ(fst_fault_set("madvise", cases[i].call, 1, cases[i].error, 0), 0);
        CHECK_EQ(fst_memory_huge(data, 2 * HUGE, 1) == UINT64_MAX, cases[i].refused);
        fst_fault_clear();
    }
    CHECK_EQ(fst_fault_set("madvise", 2, UINT64_MAX, EAGAIN, 0), 0);
    CHECK_EQ(fst_memory_huge(data, 2 * HUGE, 1), UINT64_MAX); /* after many tries */
    fst_fault_clear();
}

/* How many MiB are filled, at some microseconds each, until an arena gives up huge pages; or 0. */
static uint64_t mib_until_small(void (*note)(fst_arena *, uint64_t, uint64_t), uint64_t cost) {
    fst_arena *arena = NULL;
    fst_error err = {0};
    uint64_t mib = 0;
    MUST(fst_arena_alloc(HUGE, &arena, &err) == FST_OK);
    while (mib < 1000 && !atomic_load(&arena->small_pages)) {
        note(arena, HUGE, 2 * cost * 1000);
        mib += 2;
    }
    bool small = atomic_load(&arena->small_pages);
    fst_arena_release(&arena);
    return small ? mib : 0;
}

static void test_huge_pages_are_given_up_where_they_are_slow(void) {
    CHECK_EQ(mib_until_small(fst_arena_note_fill, 1199), 0);
    CHECK_EQ(mib_until_small(fst_arena_note_fill, 1200), 64);
    CHECK_EQ(mib_until_small(fst_arena_note_touch, 499), 0);
    CHECK_EQ(mib_until_small(fst_arena_note_touch, 500), 64);
}

int main(void) {
    RUN(test_huge_pages_are_given_up_where_they_are_slow);
    RUN(test_headroom);
    RUN(test_headroom_repeats);
    RUN(test_huge_fills_whole_pages_only);
    RUN(test_huge_advice_takes_nothing);
    RUN(test_huge_of_less_than_a_page);
    RUN(test_huge_refused);
    return test_result();
}
