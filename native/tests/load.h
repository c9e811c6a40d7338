/* load.h - one load of a plan, checked: every byte is the file's, and nothing beside them was
 * written to.
 */
#ifndef FST_TEST_LOAD_H
#define FST_TEST_LOAD_H

#include "plan.h"

#define CANARY 0xEE

/* ---- one load ---- */

typedef struct load_result {
    int code;
    fst_error err;
    fst_job_stats stats;
} load_result;

/* What a file holds; made once for the file in use, since sanitizers make loops slow. */
static inline const unsigned char *content_of(const test_file *file) {
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
static inline void check_memory(const test_file *file, const plan *p, const unsigned char *memory,
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

static inline load_result load_into(fst_arena *arena, fst_file *opened, const test_file *file,
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
    fst_job_release(&job);
    check_memory(file, touched, memory, result.code == FST_OK);
    return result;
}

/* Into malloc'ed memory of the exact size: ASan sees what lies beside it. */
static inline load_result load_open(fst_file *opened, const test_file *file, const plan *p,
                                    const fst_job_options *options) {
    fst_error err = {0};
    fst_arena *arena = NULL;
    unsigned char *memory = malloc(p->arena_bytes + 1);
    MUST(memory != NULL);
    MUST(fst_arena_borrow(memory, p->arena_bytes, &arena, &err) == FST_OK);
    load_result result = load_into(arena, opened, file, p, options);
    fst_arena_release(&arena);
    free(memory);
    return result;
}

static inline load_result load(const test_file *file, const plan *p,
                               const fst_job_options *options) {
    fst_file *opened = test_open(file);
    load_result result = load_open(opened, file, p, options);
    fst_file_release(&opened);
    return result;
}

/* ---- one fault ---- */

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

#endif
