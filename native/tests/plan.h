/* plan.h - which extents a job moves and where they go, made at random; for the tests of
 * reads and of read-ahead. The caller frees a plan.
 */
#ifndef FST_TEST_PLAN_H
#define FST_TEST_PLAN_H

#include "test.h"

#define ALL UINT64_MAX /* faults: from the first on, for ever */

/* ---- what to read, and where it goes ---- */

typedef struct plan {
    fst_segment *segments;
    uint64_t count;
    uint64_t bytes; /* of all segments */
    uint64_t arena_bytes;
} plan;

static inline uint64_t some_bytes(uint64_t *random) {
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
static inline uint64_t some_gap(uint64_t *random) {
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
static inline void place(plan *p, uint64_t *random) {
    uint64_t at = test_below(random, 50);
    bool backwards = test_below(random, 2) == 1;
    for (uint64_t i = 0; i < p->count; i++) {
        fst_segment *s = &p->segments[backwards ? p->count - 1 - i : i];
        s->arena_offset = at;
        at += s->bytes + (test_below(random, 2) ? test_below(random, 300) : 0);
    }
    p->arena_bytes = at;
}

static inline plan plan_of(uint64_t file_bytes, uint64_t (*bytes_of)(uint64_t *random),
                           uint64_t *random) {
    plan p = {.segments = calloc(256, sizeof *p.segments)};
    MUST(p.segments != NULL);
    for (uint64_t at = some_gap(random); at < file_bytes && p.count < 256;) {
        uint64_t bytes = bytes_of(random);
        if (bytes > file_bytes - at) bytes = file_bytes - at;
        p.segments[p.count++] = (fst_segment){at, bytes, 0};
        p.bytes += bytes;
        at += bytes + some_gap(random);
    }
    place(&p, random);
    return p;
}

static inline plan random_plan(uint64_t file_bytes, uint64_t *random) {
    return plan_of(file_bytes, some_bytes, random);
}

static inline plan whole_plan(uint64_t file_bytes) {
    plan p = {.segments = calloc(1, sizeof *p.segments),
              .count = 1,
              .bytes = file_bytes,
              .arena_bytes = file_bytes};
    MUST(p.segments != NULL);
    p.segments[0].bytes = file_bytes;
    return p;
}

static inline void free_plan(plan *p) { free(p->segments); }

/* ---- one job ---- */

static inline fst_job_options options_for(int mode) {
    return (fst_job_options){.struct_bytes = sizeof(fst_job_options),
                             .threads = 3,
                             .chunk_bytes = 64 << 10,
                             .mode = mode};
}

static inline int wait_for(fst_job *job, fst_error *err) {
    int code;
    while ((code = fst_job_wait(job, 1000, err)) == FST_PENDING) {
    }
    return code;
}

#endif
