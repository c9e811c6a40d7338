/* test_device_upload.c - what only uploads do: gathering pieces from all over memory into few
 * copies, and asking for what is not there yet. That their bytes are right in every shape and
 * order is in test_device.c and test_device_order.c.
 */
#include "device.h"

#include <sys/mman.h>

#include "base/fst_sys.h"

enum {
    PIECES = 300,
    ALIGNMENT = 256, /* of an arena's planner */
    MAP_BYTES = 2 << 20
};

static uint64_t copies(void) {
    return FAKE(fake_calls)(device_kind == FST_GPU_CUDA ? "cuMemcpyHtoDAsync_v2"
                                                        : "hipMemcpyHtoDAsync");
}

static int upload(fst_arena *arena, const fst_segment *segments, uint64_t count,
                  const fst_job_options *options, fst_error *err) {
    fst_job *job = NULL;
    int code = fst_job_upload(arena, segments, count, options, &job, err);
    if (code == FST_OK) code = job_result(job, err);
    fst_job_release(&job);
    return code;
}

/* ---- from all over memory ---- */

static int by_address(const void *a, const void *b) {
    uint64_t x = ((const fst_segment *)a)->file_offset, y = ((const fst_segment *)b)->file_offset;
    return x < y ? -1 : x > y;
}

/* Blocks of their own, of which a sanitizer sees every byte read beside them. */
static void make_blocks(fst_segment *segments, uint64_t largest, uint64_t *random) {
    for (int i = 0; i < PIECES; i++) {
        uint64_t bytes = 1 + test_below(random, largest);
        unsigned char *block = malloc((size_t)bytes);
        MUST(block != NULL);
        for (uint64_t k = 0; k < bytes; k++) block[k] = (unsigned char)test_random(random);
        segments[i] = (fst_segment){(uintptr_t)block, bytes, 0};
    }
    qsort(segments, PIECES, sizeof *segments, by_address);
}

/* One behind another at aligned places; returns how many bytes that takes. */
static uint64_t place_blocks(fst_segment *segments) {
    uint64_t at = 0;
    for (int i = 0; i < PIECES; i++) {
        segments[i].arena_offset = at;
        at = fst_align_up(at + segments[i].bytes, ALIGNMENT);
    }
    return at;
}

static bool blocks_right(const fst_arena *arena, const fst_segment *segments) {
    for (int i = 0; i < PIECES; i++)
        if (memcmp(arena->data + segments[i].arena_offset,
                   (const void *)(uintptr_t)segments[i].file_offset, segments[i].bytes) != 0)
            return false;
    return true;
}

static void free_blocks(const fst_segment *segments) {
    for (int i = 0; i < PIECES; i++) free((void *)(uintptr_t)segments[i].file_offset);
}

static void test_gathered(void) {
    static const uint64_t largest[] = {1, 255, 256, 257, 3000, 100000};
    uint64_t random = 3;
    for (size_t i = 0; i < sizeof largest / sizeof *largest; i++) {
        fst_segment segments[PIECES];
        fst_error err = {0};
        fst_job_options options = options_to(0, 0);
        make_blocks(segments, largest[i], &random);
        uint64_t bytes = place_blocks(segments), before = copies();
        fst_arena *arena = device_arena(bytes, 0);
        CHECK_EQ(upload(arena, segments, PIECES, &options, &err), FST_OK);
        CHECK(blocks_right(arena, segments));
        FAKE(fake_drain)();
        CHECK(blocks_right(arena, segments));
        CHECK(rest_untouched(arena, segments, PIECES));
        /* One a chunk, which is cut to pages where a piece is larger than what is left. */
        CHECK(copies() - before <= 2 * (bytes / SLOT_BYTES) + 1);
        fst_arena_release(&arena);
        free_blocks(segments);
    }
}

/* In memory that was put together from others', what lies between is somebody's; reads decide
 * it in the same place. */
static void test_borrowed(void) {
    enum {
        ROOM = 64 << 10
    };
    static unsigned char device[ROOM]; /* the fake's "device memory" */
    uint64_t random = 5, at = 1;
    fst_segment segments[PIECES];
    fst_error err = {0};
    fst_arena *arena;
    fst_job_options options = options_to(0, 0);
    make_blocks(segments, 100, &random);
    for (int i = 0; i < PIECES; i++) {
        segments[i].arena_offset = at;
        at += segments[i].bytes + (uint64_t)(i % 3); /* every third touches the next */
    }
    MUST(at <= ROOM);
    MUST(FAKE(fake_note)(device, ROOM, 0, device_streams[0]) == 0);
    MUST(fst_arena_borrow(device, ROOM, &arena, &err) == FST_OK);
    uint64_t before = copies();
    CHECK_EQ(upload(arena, segments, PIECES, &options, &err), FST_OK);
    CHECK_EQ(copies() - before, PIECES - PIECES / 3);
    FAKE(fake_drain)();
    CHECK(blocks_right(arena, segments));
    for (int i = 0; i < PIECES; i++)
        for (int k = 0; k < i % 3; k++)
            CHECK_EQ(device[segments[i].arena_offset + segments[i].bytes + (uint64_t)k], FAKE_LATE);
    fst_arena_release(&arena);
    MUST(FAKE(fake_forget)(device) == 0);
    free_blocks(segments);
}

/* What lay in a slot before is in no padding. */
static void test_padding_is_clean(void) {
    test_file made = test_create(4 * SLOT_BYTES, 3);
    fst_job_options options = options_to(0, 0);
    fst_job_stats stats;
    options.threads = 1;
    options.pinned_bytes = SLOT_BYTES;
    CHECK_EQ(device_upload_once(&made, &options, &stats), FST_OK); /* fills the one slot */
    test_gathered();
    test_remove(&made);
}

/* ---- memory that is not there yet ---- */

/* A kernel's figure, in KiB, of the map at an address; -1 when it does not tell. */
static long map_figure(const void *address, const char *name) {
    char line[512];
    long found = -1;
    bool here = false;
    FILE *maps = fopen("/proc/self/smaps", "re");
    if (maps == NULL) return -1;
    while (fgets(line, sizeof line, maps) != NULL) {
        unsigned long begin, end;
        char dash;
        if (sscanf(line, "%lx%c%lx", &begin, &dash, &end) == 3 && dash == '-')
            here = (uintptr_t)address >= begin && (uintptr_t)address < end;
        else if (here && strncmp(line, name, strlen(name)) == 0 && line[strlen(name)] == ':')
            found = strtol(line + strlen(name) + 1, NULL, 10);
    }
    (void)fclose(maps);
    return found;
}

static const fst_sys_table *real_calls;
static enum {
    ALL_THERE,
    MIDDLE_MISSING,
    UNKNOWN
} answer;
static int advice_fails; /* with this errno */
static struct {
    uintptr_t first[2], end[2]; /* of a map: what may be asked about */
    atomic_ullong looked;       /* bytes */
    atomic_ullong asked;
    atomic_int strayed;
} seen;

static void note(void *address, size_t bytes, atomic_ullong *sum) {
    uintptr_t at = (uintptr_t)address;
    bool first = at >= seen.first[0] && at + bytes <= seen.end[0];
    bool second = at >= seen.first[1] && at + bytes <= seen.end[1];
    if ((!first && !second) || at % 4096 != 0) atomic_fetch_add(&seen.strayed, 1);
    atomic_fetch_add(sum, bytes);
}

static int fake_mincore(void *address, size_t bytes, unsigned char *out) {
    uint64_t pages = bytes / (uint64_t)sysconf(_SC_PAGESIZE);
    note(address, bytes, &seen.looked);
    errno = ENOSYS;
    if (answer == UNKNOWN) return -1;
    memset(out, 1, pages);
    if (answer == MIDDLE_MISSING) out[pages / 2] = 0;
    return 0;
}

static int fake_madvise(void *address, size_t bytes, int advice) {
    if (advice == MADV_WILLNEED) {
        note(address, bytes, &seen.asked);
        errno = advice_fails;
        if (advice_fails != 0) return -1;
    }
    return real_calls->madvise(address, bytes, advice);
}

/* A private map of a file that is not cached, as programs hold their tensors in. What is missing
 * is asked for once, and no page becomes the process's own. */
static void check_map(const test_file *made, uint64_t chunk) {
    fst_job_options options = options_to(0, 0);
    fst_error err = {0};
    int fd = open(made->path, O_RDONLY | O_CLOEXEC);
    MUST(fd >= 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    void *map = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    MUST(map != MAP_FAILED && close(fd) == 0);
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), half = MAP_BYTES / 2, bytes = half - 3 * page;
    fst_segment parts[] = {{page + 9, bytes, 5000}, {half + page + 9, bytes, 5000 + bytes}};
    fst_segment source[] = {parts[0], parts[1]};
    fst_arena *arena = device_arena(MAP_BYTES, 0);
    for (int i = 0; i < 2; i++) {
        source[i].file_offset += (uintptr_t)map;
        seen.first[i] = (uintptr_t)fst_align_down(source[i].file_offset, page);
        seen.end[i] = (uintptr_t)fst_align_up(source[i].file_offset + bytes, page);
    }
    seen.looked = seen.asked = 0;
    options.chunk_bytes = chunk;
    CHECK_EQ(upload(arena, source, 2, &options, &err), FST_OK);
    CHECK(segments_right(made, arena, parts, 2, UINT64_MAX));
    CHECK_EQ(seen.strayed, 0);
    uint64_t most = 2 * bytes - 3 * (64 << 10); /* a small rest is not worth a call */
    CHECK(answer == UNKNOWN ? seen.looked > 0 : seen.looked >= most);
    CHECK(answer == MIDDLE_MISSING ? seen.asked >= most : seen.asked == 0);
    CHECK(seen.asked <= 2 * (bytes + 2 * page));
    long own = map_figure(map, "Anonymous");
    if (own < 0) test_skip("own pages", "the kernel does not tell of them");
    CHECK(own <= 0);
    fst_arena_release(&arena);
    MUST(munmap(map, MAP_BYTES) == 0);
}

static void test_file_map(void) {
    test_file made = test_create(MAP_BYTES, 3);
    real_calls = FST_SYS;
    fst_sys_table calls = *real_calls;
    calls.mincore = fake_mincore;
    calls.madvise = fake_madvise;
    atomic_store(&fst_sys_in_force, &calls);
    for (answer = ALL_THERE; answer <= UNKNOWN; answer++) {
        advice_fails = 0;
        check_map(&made, SLOT_BYTES);
        check_map(&made, 4 << 20);
        advice_fails = EIO;
        check_map(&made, SLOT_BYTES);
    }
    atomic_store(&fst_sys_in_force, real_calls);
    test_remove(&made);
}

/* ---- what is no upload ---- */

static void test_refused(void) {
    unsigned char bytes[64];
    uint64_t here = (uintptr_t)bytes;
    fst_error err = {0};
    fst_job *job;
    fst_arena *arena = device_arena(sizeof bytes, 0);
    const fst_job_options right = options_to(0, 0);
    fst_job_options wrong[] = {right, right, right, right, right, right};
    wrong[0].device = NULL;
    wrong[1].mode = FST_READ_DIRECT;
    wrong[2].drop_cache = 1;
    wrong[3].reserve_bytes = 1;
    wrong[4].threads = 0;
    wrong[5].chunk_bytes = 1;
    fst_segment all = {here, sizeof bytes, 0};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        CHECK_EQ(fst_job_upload(arena, &all, 1, &wrong[i], &job, &err), FST_E_INVALID);
        CHECK(job == NULL && strstr(err.message, "host memory") != NULL);
    }
    const fst_segment bad[][2] = {
        {{here, 8, 0}, {here + 7, 8, 8}},                /* overlap */
        {{here + 8, 8, 0}, {here, 8, 8}},                /* order */
        {{here, 8, 0}, {here + 8, 8, sizeof bytes - 7}}, /* beyond the arena */
        {{here, 8, 0}, {UINT64_MAX - 7, 8, 8}},          /* beyond all memory */
        {{here, 8, 0}, {here + 8, UINT64_MAX - 8, 8}},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_EQ(fst_job_upload(arena, bad[i], 2, &right, &job, &err), FST_E_INVALID);
        CHECK(job == NULL);
    }
    CHECK_EQ(copies(), 0);
    fst_arena_release(&arena);
}

int main(void) {
    for (device_kind = FST_GPU_CUDA; device_kind <= FST_GPU_HIP; device_kind++) {
        RUN_ON(test_gathered);
        RUN_ON(test_borrowed);
        RUN_ON(test_padding_is_clean);
        RUN_ON(test_file_map);
        RUN_ON(test_refused);
    }
    return test_result();
}
