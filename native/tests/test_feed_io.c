/* test_feed_io.c - reading files that a callback feeds: every byte, every failure, what is refused.
 */
#include "load.h"

#include <stdatomic.h>

#include "file/fst_feed.h"

typedef struct source { /* gives a test_file's bytes */
    const test_file *made;
    const unsigned char *content; /* of it */
    atomic_int calls;
    int failing;    /* number of the call that fails, from 1; 0: none */
    int64_t answer; /* of that call */
    atomic_ullong bytes;
} source;

static int64_t give(void *context, uint64_t offset, uint64_t bytes, void *into) {
    source *from = context;
    CHECK(bytes > 0 && offset + bytes <= from->made->size);
    (void)atomic_fetch_add(&from->bytes, bytes);
    if (atomic_fetch_add(&from->calls, 1) + 1 == from->failing) {
        memset(into, 0xAB, bytes); /* what a failed call leaves does not matter */
        return from->answer;
    }
    memcpy(into, from->content + offset, bytes);
    return (int64_t)bytes;
}

static fst_file *feed(source *from, int32_t most) {
    fst_file *file = NULL;
    fst_file_info info;
    fst_error err = {0};
    from->content = content_of(from->made);
    MUST(fst_file_feed("fed://here/file", from->made->size, most, give, from, &file, &info, &err) ==
         FST_OK);
    CHECK(info.size == from->made->size && info.fd == -1);
    return file;
}

static load_result load_fed(source *from, const plan *p, const fst_job_options *options) {
    fst_file *file = feed(from, 8);
    load_result result = load_open(file, from->made, p, options);
    fst_file_release(&file);
    return result;
}

/* ---- bytes ---- */

static void test_random_plans(void) {
    uint64_t random = 7;
    test_file made = {.size = (3 << 20) + 123, .salt = 3};
    (void)content_of(&made);
    for (int i = 0; i < (UNDER_TSAN ? 5 : 40); i++) {
        source from = {.made = &made};
        plan p = random_plan(made.size, &random);
        fst_job_options options = options_for(FST_READ_BUFFERED);
        options.threads = 1 + (int32_t)test_below(&random, 5);
        options.chunk_bytes <<= test_below(&random, 6);
        load_result result = load_fed(&from, &p, &options);
        CHECK_EQ(result.code, FST_OK);
        CHECK_EQ(result.stats.bytes_direct, 0);
        CHECK(atomic_load(&from.bytes) >= p.bytes);
        free_plan(&p);
    }
}

/* Into memory of the engine's own, which large runs go straight into. */
static void test_anonymous_memory(void) {
    uint64_t random = 11;
    test_file made = {.size = 3 << 20, .salt = 4};
    (void)content_of(&made);
    for (int whole = 0; whole < 2; whole++) {
        source from = {.made = &made};
        plan p = whole ? whole_plan(made.size) : random_plan(made.size, &random);
        fst_job_options options = options_for(FST_READ_BUFFERED);
        fst_file *file = feed(&from, 8);
        fst_arena *arena = NULL;
        fst_error err = {0};
        MUST(fst_arena_alloc(p.arena_bytes, &arena, &err) == FST_OK);
        load_result result = load_into(arena, file, &made, &p, &options);
        CHECK_EQ(result.code, FST_OK);
        if (whole) CHECK_EQ(atomic_load(&from.bytes), made.size); /* nothing twice */
        fst_arena_release(&arena);
        fst_file_release(&file);
        free_plan(&p);
    }
}

static void test_no_thread(void) {
    test_file made = {.size = 1 << 20, .salt = 3};
    source from = {.made = &made};
    plan p = whole_plan(made.size);
    fst_job_options options = options_for(FST_READ_BUFFERED);
    MUST(fst_fault_set("pthread_create", 1, ALL, EAGAIN, 0) == 0);
    CHECK_EQ(load_fed(&from, &p, &options).code, FST_OK);
    free_plan(&p);
}

static void test_reads_of_the_caller(void) {
    static unsigned char got[5000];
    fst_error err = {0};
    test_file made = {.size = 100000, .salt = 3};
    source from = {.made = &made};
    fst_file *file = feed(&from, 1);
    CHECK_EQ(fst_file_read(file, 4000, got, sizeof got, &err), FST_OK);
    CHECK(memcmp(got, content_of(&made) + 4000, sizeof got) == 0);
    CHECK_EQ(fst_file_read(file, made.size, got, 0, &err), FST_OK);
    CHECK_EQ(fst_file_read(file, made.size - 1, got, 2, &err), FST_E_TRUNCATED);
    CHECK_EQ(fst_file_read(file, UINT64_MAX - 1, got, 1, &err), FST_E_INVALID);
    fst_file_release(&file);
}

static void test_header(void) {
    static const char text[] =
        "        {\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}xy";
    static char content[sizeof text];
    fst_error err = {0};
    fst_file *file = NULL;
    fst_file_info info;
    fst_layout *layout = NULL, *again = NULL;
    fst_layout_view view;
    memcpy(content, text, sizeof text);
    uint64_t header_bytes = sizeof text - 1 - 8 - 2;
    for (int i = 0; i < 8; i++) content[i] = (char)(header_bytes >> 8 * i & 0xFF);
    test_file made = test_create_text(content, sizeof text - 1);
    fst_file *local = test_open(&made);
    MUST(fst_layout_read(local, NULL, &layout, &view, &err) == FST_OK);
    fst_file_release(&local);
    test_remove(&made);
    /* The same bytes, fed. */
    extern int64_t give_text(void *context, uint64_t offset, uint64_t bytes, void *into);
    MUST(fst_file_feed("x", sizeof text - 1, 1, give_text, content, &file, &info, &err) == FST_OK);
    CHECK_EQ(fst_layout_read(file, layout, &again, &view, &err), FST_PENDING);
    CHECK_EQ(fst_layout_read(file, NULL, &again, &view, &err), FST_OK);
    CHECK_EQ(view.count, 1);
    fst_layout_release(&again);
    fst_layout_release(&layout);
    fst_file_release(&file);
}

int64_t give_text(void *context, uint64_t offset, uint64_t bytes, void *into);
int64_t give_text(void *context, uint64_t offset, uint64_t bytes, void *into) {
    memcpy(into, (const char *)context + offset, bytes);
    return (int64_t)bytes;
}

/* ---- failures ---- */

static void check_failure(int64_t answer, int expected, int sys_errno) {
    static test_file made = {.size = 1 << 20, .salt = 3};
    static source from; /* calls run on when the failure is known */
    static unsigned char memory[1 << 20];
    for (int failing = 1; failing <= 16; failing += 5) {
        fst_error err = {0};
        fst_job *job = NULL;
        fst_arena *arena = NULL;
        fst_job_stats stats = {0};
        fst_segment all = {0, made.size, 0};
        fst_job_options options = options_for(FST_READ_BUFFERED);
        from = (source){.made = &made, .failing = failing, .answer = answer};
        fst_file *file = feed(&from, 8);
        MUST(fst_arena_borrow(memory, sizeof memory, &arena, &err) == FST_OK);
        MUST(fst_job_read(file, arena, &all, 1, &options, &job, &err) == FST_OK);
        CHECK_EQ(wait_for(job, &err), expected);
        CHECK_EQ(err.code, expected);
        CHECK_EQ(err.sys_errno, sys_errno);
        CHECK(strstr(err.message, "fed://here/file") != NULL);
        while (!stats.done) fst_job_get_stats(job, &stats);
        CHECK_EQ(stats.bytes_done + stats.bytes_skipped, made.size);
        fst_job_release(&job);
        fst_arena_release(&arena);
        fst_file_release(&file);
    }
}

static void test_failing_callback(void) { check_failure(-77, FST_E_FEED, 77); }
static void test_failure_with_a_large_number(void) {
    check_failure(INT64_MIN, FST_E_FEED, INT32_MAX);
}
static void test_short_fill(void) { check_failure(1000, FST_E_TRUNCATED, 0); }
static void test_nothing_filled(void) { check_failure(0, FST_E_TRUNCATED, 0); }
static void test_claims_too_much(void) { check_failure(INT64_MAX, FST_E_INVALID, 0); }

/* ---- refused ---- */

static void test_refused(void) {
    static unsigned char memory[4096];
    fst_error err = {0};
    test_file made = {.size = sizeof memory, .salt = 3};
    source from = {.made = &made};
    fst_file *file = feed(&from, 1), *none = NULL;
    fst_arena *arena = NULL, *map = NULL;
    fst_job *job = NULL;
    fst_segment all = {0, sizeof memory, 0};
    uint64_t resident = 1;
    int probe = 1;
    CHECK_EQ(fst_arena_map(file, &map, &err), FST_E_INVALID);
    CHECK(map == NULL && strstr(err.message, "not a local file") != NULL);
    CHECK_EQ(fst_file_residency(file, 0, 1, &resident, &probe), FST_E_INVALID);
    CHECK(resident == 0 && probe == FST_PROBE_NONE);
    fst_file_read_exactly(file);
    MUST(fst_arena_borrow(memory, sizeof memory, &arena, &err) == FST_OK);
    for (int mode = FST_READ_BUFFERED; mode <= FST_READ_DIRECT_IF_COLD; mode++) {
        fst_job_options options = options_for(mode);
        options.drop_cache = mode == FST_READ_BUFFERED;
        CHECK_EQ(fst_job_read(file, arena, &all, 1, &options, &job, &err), FST_E_INVALID);
        CHECK(job == NULL && strstr(err.message, "not a local file") != NULL);
    }
    test_file local = test_create(sizeof memory, 3);
    fst_file *opened = test_open(&local);
    MUST(fst_arena_map(opened, &map, &err) == FST_OK);
    fst_job_options ahead = options_for(0);
    CHECK_EQ(fst_job_prefetch(file, map, &all, 1, &ahead, &job, &err), FST_E_INVALID);
    CHECK(job == NULL);
    fst_arena_release(&map);
    fst_file_release(&opened);
    test_remove(&local);
    fst_arena_release(&arena);
    fst_file_release(&file);
    fst_file_info info;
    CHECK_EQ(fst_file_feed("x", 1, 0, give, &from, &none, &info, &err), FST_E_INVALID);
    CHECK_EQ(fst_file_feed("x", 1, 65, give, &from, &none, &info, &err), FST_E_INVALID);
    CHECK_EQ(fst_file_feed("x", 1, 1, NULL, &from, &none, &info, &err), FST_E_INVALID);
    CHECK_EQ(fst_file_feed("x", UINT64_MAX, 1, give, &from, &none, &info, &err), FST_E_INVALID);
    CHECK(none == NULL && atomic_load(&from.calls) == 0);
}

/* ---- how many at a time ---- */

/* Calls of one second each on a link that `link` calls fill. Returns the width in the end. */
static int32_t width_on(fst_window *w, int32_t most, int32_t link, int rounds, uint64_t bytes) {
    uint64_t now = 1;
    while (w->calls < w->open && w->calls < most) fst_window_begin(w, most, now);
    for (int i = 0; i < rounds; i++) {
        int32_t at_a_time = w->calls < link ? w->calls : link;
        now += 1000000000u / (uint64_t)at_a_time;
        (void)fst_window_end(w, most, bytes, now);
        while (w->calls < w->open && w->calls < most) fst_window_begin(w, most, now);
    }
    return w->open;
}

static void test_window(void) {
    fst_window narrow = {.open = FST_WINDOW_FIRST};
    CHECK_EQ(width_on(&narrow, 32, 4, 200, 1000), 4);
    fst_window some = {.open = FST_WINDOW_FIRST};
    CHECK_EQ(width_on(&some, 32, 16, 400, 1000), 16);
    fst_window wide = {.open = FST_WINDOW_FIRST};
    CHECK_EQ(width_on(&wide, 20, 64, 400, 1000), 20);
    CHECK_EQ(width_on(&narrow, 32, 16, 800, 3000), 16); /* the link is another one by now */
    /* A file that is read by one call at a time leaves the window as it is. */
    fst_window one = {.open = FST_WINDOW_FIRST};
    CHECK_EQ(width_on(&one, 1, 8, 100, 1000), FST_WINDOW_FIRST);
    /* Few requests say nothing of the link. */
    fst_window idle = {.open = FST_WINDOW_FIRST};
    for (uint64_t now = 1; now < 100; now++) {
        fst_window_begin(&idle, 32, now);
        CHECK(!fst_window_end(&idle, 32, 1000, now + 1));
    }
    CHECK_EQ(idle.open, FST_WINDOW_FIRST);
    CHECK_EQ(idle.calls, 0);
    CHECK(idle.measured == 0 && idle.rate == 0);
    CHECK(wide.measured >= 2 && wide.rate > 19 * 900 && wide.rate < 21 * 1000);
}

int main(void) {
    RUN(test_random_plans);
    RUN(test_anonymous_memory);
    RUN(test_no_thread);
    RUN(test_reads_of_the_caller);
    RUN(test_header);
    RUN(test_failing_callback);
    RUN(test_failure_with_a_large_number);
    RUN(test_short_fill);
    RUN(test_nothing_filled);
    RUN(test_claims_too_much);
    RUN(test_refused);
    RUN(test_window);
    return test_result();
}
