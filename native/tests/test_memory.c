/* test_memory.c - how much memory is said to be left. */
#include "test.h"

#include <sys/sysinfo.h>

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

int main(void) {
    RUN(test_headroom);
    RUN(test_headroom_repeats);
    return test_result();
}
