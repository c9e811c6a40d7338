/* plan.c - fuzz target: what becomes of a plan in C (fst_job.c, fst_chunk.c, fst_pieces.c, and the
 * reads that they start). Python plans: it gives C a list of segments, which C validates, cuts into
 * chunks and gathers into copies.
 *
 * An input is a kind of load, flags, a chunk size, and segments: see segments_of. A job must be
 * refused exactly if it breaks the rules of fst.h. Else every byte must arrive, those before an
 * offset as soon as fst_job_wait_until says so, and nothing beside them may be written to. No
 * thread can be started, so the caller moves all chunks: the same input does the same.
 */
#include "fuzz.h"

#include "device.h" /* first: it includes test.h */

#include <sys/mman.h>

enum {
    CONTENT = 5 << 20, /* of the file: more than two huge pages */
    SEGMENTS = 48,
    CANARY = 0xEE,
};

enum kind {
    FILE_TO_BORROWED,
    FILE_TO_OWN,
    FILE_DIRECT,
    FED_TO_BORROWED,
    FED_TO_OWN,
    FILE_TO_DEVICE,
    FILE_DIRECT_TO_DEVICE,
    FED_TO_DEVICE,
    UPLOAD,
    KINDS
};

typedef struct load {
    enum kind kind;
    fst_job_options options;
    fst_segment segments[SEGMENTS];
    uint64_t count;
    uint64_t bytes; /* of all segments */
    uint64_t arena_bytes;
    bool wild;      /* some number is any: what it reads may not exist, or go to one place twice */
    uint64_t waits; /* how many times to wait for a part */
    bool gives_up;  /* then it is released before it is done */
    uint64_t stop_at; /* steps by which parts are waited for */
} load;

static bool is_fed(const load *l) {
    return l->kind == FED_TO_BORROWED || l->kind == FED_TO_OWN || l->kind == FED_TO_DEVICE;
}

static uint64_t loads, refused;
static const unsigned char *content;
static fst_file *file, *fed;

/* ---- an input's numbers ---- */

typedef struct reader {
    const uint8_t *at, *end;
} reader;

static uint64_t next(reader *from, int bytes) {
    uint64_t number = 0;
    for (int i = 0; i < bytes && from->at < from->end; i++)
        number |= (uint64_t)*from->at++ << 8 * i;
    return number;
}

/* Sizes that matter: none, a few bytes, what is read over as a gap, pages, chunks. */
static uint64_t next_bytes(reader *from, uint64_t class) {
    switch (class & 7) {
    case 0:
        return 0;
    case 1:
        return next(from, 1);
    case 2:
        return next(from, 2);
    case 3:
        return 65536 - 128 + next(from, 1);
    case 4:
        return 4096 * next(from, 1);
    case 5:
        return next(from, 3) % (2 << 20);
    case 6:
        return (2u << 20) - 128 + next(from, 1);
    default:
        return 256;
    }
}

/* Each: what it is made of, then the numbers for that: a gap in the source, bytes, a gap in the
 * arena. */
static void segments_of(reader *from, bool backwards, load *l) {
    uint64_t source = 0, arena = 0, gaps[SEGMENTS];
    while (from->at < from->end && l->count < SEGMENTS) {
        uint64_t class = next(from, 2);
        source += next_bytes(from, class);
        if (source > CONTENT) source = CONTENT;
        uint64_t bytes = fst_min(next_bytes(from, class >> 3), CONTENT - source);
        gaps[l->count] = next_bytes(from, class >> 6);
        if (gaps[l->count] > 1 << 16) gaps[l->count] = 1 << 16;
        l->segments[l->count++] = (fst_segment){source, bytes, 0};
        source += bytes;
    }
    for (uint64_t i = 0; i < l->count; i++) {
        uint64_t at = backwards ? l->count - 1 - i : i;
        arena += gaps[at];
        l->segments[at].arena_offset = arena;
        arena += l->segments[at].bytes;
    }
    l->arena_bytes = arena;
}

/* In one place, a number that is near a limit, or any. */
static void make_wild(reader *from, load *l) {
    uint64_t what = next(from, 2), near = next(from, 1 + (what & 7));
    const uint64_t limits[] = {0, 0 - (near & 0xFFFF), CONTENT - (near & 0xFF),
                               l->arena_bytes - (near & 0xFF)};
    if (l->count == 0) return;
    fst_segment *s = &l->segments[(what >> 7) % l->count];
    uint64_t *const fields[] = {&s->file_offset, &s->bytes, &s->arena_offset};
    uint64_t limit = limits[what >> 3 & 3];
    *fields[(what >> 5 & 3) % 3] = limit == 0 ? near : limit;
    l->wild = true;
}

static load load_of(reader *from) {
    static const uint64_t chunks[] = {
        65536,   65537,    100000, 1 << 17, 1 << 20,       2 << 20, (2 << 20) + 4096,
        3 << 20, 64 << 20, 0,      65535,   (64 << 20) + 1};
    load l = {.kind = (enum kind)(next(from, 1) % KINDS)};
    uint64_t flags = next(from, 3);
    reader wild = *from;
    bool to_device = l.kind >= FILE_TO_DEVICE;
    l.options = to_device ? options_to(0, FST_READ_BUFFERED)
                          : (fst_job_options){.struct_bytes = sizeof l.options, .threads = 2};
    l.options.chunk_bytes = chunks[next(from, 1) % (sizeof chunks / sizeof *chunks)];
    if (l.kind == FILE_DIRECT || l.kind == FILE_DIRECT_TO_DEVICE) l.options.mode = FST_READ_DIRECT;
    if (is_fed(&l) || l.kind == UPLOAD) /* elsewhere it takes 30 ms */
        l.options.drop_cache = (flags & 0x70) == 0x70;
    if ((flags & 0x380) == 0x380) l.options.threads = (int32_t)next(from, 1) - 64;
    l.waits = flags >> 10 & 7;
    l.gives_up = (flags >> 13 & 7) == 7;
    l.stop_at = next_bytes(from, flags >> 1);
    segments_of(from, flags & 1, &l);
    if (flags >> 16 > 192) make_wild(&wild, &l);
    if (l.kind == UPLOAD)
        for (uint64_t i = 0; i < l.count; i++) l.segments[i].file_offset += (uintptr_t)content;
    return l;
}

/* ---- the rules of fst.h, said again ---- */

static bool is_valid(load *l) {
    const fst_job_options *o = &l->options;
    __extension__ typedef unsigned __int128 wide;
    wide last = l->kind == UPLOAD ? (wide)INT64_MAX : CONTENT, end = 0;
    if (o->threads < 1 || o->threads > 64) return false;
    if (o->chunk_bytes < 64 << 10 || o->chunk_bytes > 64 << 20) return false;
    if ((is_fed(l) || l->kind == UPLOAD) && o->drop_cache) return false;
    for (uint64_t i = 0; i < l->count; i++) {
        const fst_segment *s = &l->segments[i];
        if (s->file_offset < end) return false;
        end = (wide)s->file_offset + s->bytes;
        if (end > last || (wide)s->arena_offset + s->bytes > l->arena_bytes) return false;
        l->bytes += s->bytes;
    }
    return true;
}

/* Whether an upload reads nothing but what there is. */
static bool is_harmless(const load *l) {
    for (uint64_t i = 0; i < l->count && l->kind == UPLOAD && l->wild; i++) {
        uint64_t at = l->segments[i].file_offset - (uintptr_t)content;
        if (at > CONTENT || l->segments[i].bytes > CONTENT - at) return false;
    }
    return true;
}

/* ---- what there is ---- */

static int64_t feed(void *context, uint64_t offset, uint64_t bytes, void *into) {
    (void)context;
    MUST(offset <= CONTENT && bytes <= CONTENT - offset);
    memcpy(into, content + offset, bytes);
    return (int64_t)bytes;
}

static void prepare(void) {
    static _Alignas(4096) unsigned char bytes[CONTENT];
    char path[64];
    fst_file_info info;
    fst_error err = {0};
    for (uint64_t i = 0; i < CONTENT; i++) bytes[i] = test_byte(i, 1);
    content = bytes;
    int fd = memfd_create("content", MFD_CLOEXEC);
    MUST(fd >= 0);
    MUST(write(fd, bytes, CONTENT) == CONTENT);
    (void)snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    MUST(fst_file_open(path, &file, &info, &err) == FST_OK);
    MUST(close(fd) == 0);
    MUST(fst_file_feed("fed", CONTENT, 4, feed, NULL, &fed, &info, &err) == FST_OK);
    device_open_all();
    MUST(fst_fault_set("pthread_create", 1, UINT64_MAX, EAGAIN, 0) == 0);
}

static fst_arena *arena_of(const load *l, void **memory) {
    fst_arena *arena = NULL;
    fst_error err = {0};
    *memory = NULL;
    if (l->options.device != NULL) return device_arena(l->arena_bytes, 0);
    if (l->kind == FILE_TO_OWN || l->kind == FED_TO_OWN) {
        MUST(fst_arena_alloc(l->arena_bytes + 1, &arena, &err) == FST_OK);
        return arena;
    }
    *memory = malloc(l->arena_bytes + 1); /* ASan sees what is behind the arena */
    MUST(*memory != NULL);
    memset(*memory, CANARY, l->arena_bytes + 1);
    MUST(fst_arena_borrow(*memory, l->arena_bytes, &arena, &err) == FST_OK);
    return arena;
}

/* ---- what must hold ---- */

/* The segments' bytes before an offset are there. */
static void check_arrived(const load *l, fst_arena *arena, uint64_t until) {
    uint64_t base = l->kind == UPLOAD ? 0 : (uintptr_t)content;
    const unsigned char *memory = fst_arena_data(arena);
    for (uint64_t i = 0; i < l->count && l->segments[i].file_offset < until; i++) {
        const fst_segment *s = &l->segments[i];
        uint64_t bytes = fst_min(s->bytes, until - s->file_offset);
        MUST(bytes == 0 || memcmp(memory + s->arena_offset,
                                  (const void *)(uintptr_t)(base + s->file_offset), bytes) == 0);
    }
}

static void check_rest(const load *l, fst_arena *arena) {
    if (l->options.device != NULL) {
        MUST(rest_untouched(arena, l->segments, l->count));
        return;
    }
    const unsigned char *memory = fst_arena_data(arena);
    int rest = arena->kind == FST_ARENA_BORROWED ? CANARY : 0;
    unsigned char *wanted = malloc(l->arena_bytes + 1);
    MUST(wanted != NULL);
    memset(wanted, rest, l->arena_bytes + 1);
    for (uint64_t i = 0; i < l->count; i++) {
        const fst_segment *s = &l->segments[i];
        memcpy(wanted + s->arena_offset, memory + s->arena_offset, s->bytes);
    }
    MUST(memcmp(wanted, memory, l->arena_bytes + 1) == 0);
    free(wanted);
}

/* Each call moves one chunk at most, and none takes longer than there are chunks. */
static void wait_until(const load *l, fst_job *job, uint64_t offset) {
    fst_error err = {0};
    uint64_t calls = 2 * (l->bytes / (64 << 10) + l->count) + 8;
    int code;
    while ((code = fst_job_wait_until(job, offset, 1000, &err)) == FST_PENDING) MUST(calls-- > 0);
    MUST(code == FST_OK);
}

static void check_done(const load *l, fst_job *job, fst_arena *arena) {
    fst_job_stats stats;
    fst_error err = {0};
    wait_until(l, job, UINT64_MAX);
    MUST(fst_job_wait(job, 1000, &err) == FST_OK);
    fst_job_get_stats(job, &stats);
    MUST(stats.done && stats.bytes_total == l->bytes && stats.bytes_done == l->bytes &&
         stats.bytes_skipped == 0);
    if (l->wild) return;
    check_arrived(l, arena, UINT64_MAX);
    if (l->options.device != NULL) {
        FAKE(fake_drain)();
        check_arrived(l, arena, UINT64_MAX);
    }
    check_rest(l, arena);
}

static void follow(const load *l, fst_job *job, fst_arena *arena) {
    uint64_t offset = l->count == 0 ? 0 : l->segments[0].file_offset;
    for (uint64_t i = 0; i < l->waits; i++) {
        offset += l->stop_at;
        wait_until(l, job, offset);
        if (!l->wild) check_arrived(l, arena, offset);
    }
    if (!l->gives_up) check_done(l, job, arena);
}

bool fuzz_summary(void) {
    (void)printf("plan: %llu loads, %llu refused\n", (unsigned long long)loads,
                 (unsigned long long)refused);
    fst_file_release(&file);
    fst_file_release(&fed);
    return refused < loads;
}

static void summary(void) { (void)fuzz_summary(); }

int LLVMFuzzerInitialize(int *argc, char ***argv) { /* driver.c does not call it */
    (void)argc, (void)argv;
    return atexit(summary);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes) {
    if (content == NULL) prepare();
    reader from = {input, input + bytes};
    load l = load_of(&from);
    bool valid = is_valid(&l);
    if (!is_harmless(&l)) return 0;
    void *memory;
    fst_job *job = NULL;
    fst_error err = {0};
    fst_arena *arena = arena_of(&l, &memory);
    int code = l.kind == UPLOAD ? fst_job_upload(arena, l.segments, l.count, &l.options, &job, &err)
                                : fst_job_read(is_fed(&l) ? fed : file, arena, l.segments, l.count,
                                               &l.options, &job, &err);
    loads++;
    if (valid) {
        MUST(code == FST_OK);
        follow(&l, job, arena);
    } else {
        refused++;
        MUST(code == FST_E_INVALID && job == NULL && err.message[0] != '\0');
    }
    fst_job_release(&job);
    fst_arena_release(&arena);
    free(memory);
    if (l.options.device != NULL) MUST(check_violations());
    return 0;
}
