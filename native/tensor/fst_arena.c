/* fst_arena.c - memory that tensors live in. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/fst_sys.h"
#include "file/fst_file.h"
#include "tensor/fst_arena.h"
#include "tensor/fst_dlpack.h"

/* The measurements behind these are in docs/design-notes.md, "Arenas in huge pages". */
#define SLOW_NANOSECONDS_PER_MIB 1200000u
#define SLOW_TOUCH_PER_MIB 500000u
#define JUDGED_BYTES (64u << 20)  /* a few slow pages are no reason to give up huge pages */
#define CHUNK_JUDGED (512u << 10) /* in smaller chunks, calls cost as much as pages */

static int new_arena(enum fst_arena_kind kind, void *data, uint64_t bytes, fst_arena **out,
                     fst_error *err) {
    fst_arena *arena = calloc(1, sizeof *arena);
    if (arena == NULL) return fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory for an arena's record");
    atomic_init(&arena->users, 1);
    atomic_init(&arena->refs, 1);
    arena->kind = kind;
    arena->data = data;
    arena->bytes = bytes;
    arena->device_type = DL_CPU;
    atomic_fetch_add(&fst_counts.arenas, 1);
    if (kind == FST_ARENA_ANONYMOUS) atomic_fetch_add(&fst_counts.arena_bytes, bytes);
    *out = arena;
    return FST_OK;
}

int fst_arena_map(fst_file *file, fst_arena **out, fst_error *err) {
    uint64_t bytes = file->info.size;
    *out = NULL;
    if (fst_file_refuse_fed(file, "map", err) != FST_OK) return err->code;
    if (bytes == 0 || bytes > SIZE_MAX)
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: cannot map %llu bytes", file->path,
                        (unsigned long long)bytes);
    void *map =
        FST_SYS->mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file->fd, 0);
    if (map == MAP_FAILED)
        return fst_fail(err, errno == ENOMEM ? FST_E_NOMEM : FST_E_SYS, errno,
                        "%s: mapping %llu bytes: %s", file->path, (unsigned long long)bytes,
                        strerror(errno));
    int code = new_arena(FST_ARENA_MAP, map, bytes, out, err);
    if (code != FST_OK) {
        (void)munmap(map, (size_t)bytes);
        return code;
    }
    (*out)->pages = (fst_pages){.data = map, .bytes = bytes, .map = map, .map_bytes = bytes};
    return FST_OK;
}

/* The kernel reads more than it is asked for (seen with its tracepoints, mm/readahead.c):
 *
 *   a fault on what is not cached       half a window in front of it, and half behind
 *   a fault by huge pages, a read       as much as they ask for, and a mark is left. A later fault
 *                                       on the mark, in any process, reads a window behind what
 *                                       is cached
 *
 * MADV_RANDOM on a map prevents that. It is set on the ends of extents that lie beside unwanted
 * bytes, as far as a window (8 MiB here) may reach. The price: where memory is short, the kernel
 * evicts pages of random maps first. */
#define WINDOW_MAX (64u << 20)
#define UNWANTED_MIN (64u << 10) /* less is read over anyway */
/* Each splits the map into up to two more areas; a process may have some 65,000. */
#define AREAS_MAX 30

typedef struct range { /* bytes [begin, end) of a map; begin == end: none */
    uint64_t begin, end;
} range;

/* The next of the wanted extents, neighbours joined; false: there is none. */
static bool next_extent(const fst_arena *map, const fst_segment **next, const fst_segment *last,
                        range *e) {
    const fst_segment *s = *next;
    while (s < last && s->bytes == 0) s++;
    if (s == last) return false;
    e->begin = e->end = s->file_offset;
    for (; s < last && s->file_offset < e->end + UNWANTED_MIN; s++) {
        if (s->file_offset > map->bytes || s->bytes > map->bytes - s->file_offset) return false;
        if (s->file_offset + s->bytes > e->end) e->end = s->file_offset + s->bytes;
    }
    *next = s;
    return e->end > e->begin;
}

static void advise(const fst_arena *map, range *a, int advice) {
    uint64_t first = fst_align_down(a->begin, fst_page());
    if (a->begin < a->end)
        (void)FST_SYS->madvise(map->data + first, (size_t)(a->end - first), advice);
    *a = (range){0};
}

/* Counts the areas of a map beside which bytes are unwanted, and with `apply` sets MADV_RANDOM on
 * them. Areas at most `near` bytes apart are joined. Returns how many there are. */
static uint64_t random_areas(const fst_arena *map, const fst_segment *wanted, uint64_t count,
                             uint64_t near, bool apply) {
    const fst_segment *next = wanted;
    range e = {0}, last = {0};
    uint64_t areas = 0, before = 0; /* where the extent before e ends */
    while (next_extent(map, &next, wanted + count, &e)) {
        uint64_t window = fst_min(e.end - e.begin, WINDOW_MAX);
        const range sides[2] = {
            {e.begin, e.begin - before >= UNWANTED_MIN ? e.begin + window : e.begin},
            {map->bytes - e.end >= UNWANTED_MIN ? e.end - window : e.end, e.end},
        };
        for (int i = 0; i < 2; i++) {
            if (sides[i].begin == sides[i].end) continue;
            bool joins = areas > 0 && sides[i].begin <= last.end + near;
            if (!joins) {
                if (apply) advise(map, &last, MADV_RANDOM);
                last = (range){sides[i].begin, sides[i].begin};
                areas++;
            }
            last.end = sides[i].end;
        }
        before = e.end;
    }
    if (apply) advise(map, &last, MADV_RANDOM);
    return areas;
}

void fst_arena_keep_to(fst_arena *map, const fst_segment *wanted, uint64_t count) {
    uint64_t near = WINDOW_MAX;
    if (map->kind != FST_ARENA_MAP) return;
    while (random_areas(map, wanted, count, near, false) > AREAS_MAX) near *= 2;
    atomic_store(&map->kept, true);
    (void)random_areas(map, wanted, count, near, true);
}

void fst_arena_keep_no_more(fst_arena *map) {
    range all = {0, map->bytes};
    if (atomic_exchange(&map->kept, false)) advise(map, &all, MADV_NORMAL);
}

/* Some hosts back a guest's free memory only when it is touched, and have taken back whole free
 * blocks. Huge pages come from such blocks, and small ones from memory that was freed lately. */
static void judge(fst_arena *arena, uint64_t bytes, uint64_t nanoseconds, uint64_t slow) {
    if (arena->kind != FST_ARENA_ANONYMOUS || bytes < CHUNK_JUDGED) return;
    uint64_t spent = atomic_fetch_add(&arena->fill_nanoseconds, nanoseconds) + nanoseconds;
    uint64_t filled = atomic_fetch_add(&arena->fill_bytes, bytes) + bytes;
    if (filled < JUDGED_BYTES) return;
    atomic_store(&arena->fill_bytes, 0); /* two workers at once decide twice: no harm */
    atomic_store(&arena->fill_nanoseconds, 0);
    if (spent < (filled >> 20) * slow) return;
    if (atomic_exchange(&arena->small_pages, true)) return;
    /* It concerns pages not touched yet, and is advice only. */
    (void)FST_SYS->madvise(arena->pages.map, (size_t)arena->pages.map_bytes, MADV_NOHUGEPAGE);
}

void fst_arena_note_fill(fst_arena *arena, uint64_t bytes, uint64_t cpu_nanoseconds) {
    judge(arena, bytes, cpu_nanoseconds, SLOW_NANOSECONDS_PER_MIB);
}

void fst_arena_note_touch(fst_arena *arena, uint64_t bytes, uint64_t cpu_nanoseconds) {
    judge(arena, bytes, cpu_nanoseconds, SLOW_TOUCH_PER_MIB);
}

int fst_arena_alloc(uint64_t bytes, fst_arena **out, fst_error *err) {
    fst_pages pages;
    *out = NULL;
    int failed = fst_pages_map(&pages, bytes);
    if (failed != 0)
        return fst_fail(err, FST_E_NOMEM, failed, "allocating %llu bytes: %s",
                        (unsigned long long)bytes, strerror(failed));
    int code = new_arena(FST_ARENA_ANONYMOUS, pages.data, bytes, out, err);
    if (code != FST_OK) {
        fst_pages_unmap(&pages);
        return code;
    }
    (*out)->pages = pages;
    return FST_OK;
}

int fst_arena_borrow(void *base, uint64_t bytes, fst_arena **out, fst_error *err) {
    *out = NULL;
    return new_arena(FST_ARENA_BORROWED, base, bytes, out, err);
}

int fst_arena_adopt(uintptr_t managed, fst_arena **out, fst_error *err) {
    dl_managed *owner = (dl_managed *)managed;
    const dl_tensor *t = &owner->tensor;
    uint64_t bytes = 1;
    *out = NULL;
    for (int32_t d = 0; d < t->ndim; d++)
        if (t->shape[d] < 0 || __builtin_mul_overflow(bytes, (uint64_t)t->shape[d], &bytes))
            return fst_fail(err, FST_E_INVALID, EINVAL, "memory of an impossible size");
    if (t->dtype.bits != 8 || t->dtype.lanes != 1)
        return fst_fail(err, FST_E_INVALID, EINVAL, "memory is adopted as bytes");
    int code =
        new_arena(FST_ARENA_ADOPTED, (unsigned char *)t->data + t->byte_offset, bytes, out, err);
    if (code != FST_OK) return code;
    (*out)->device_type = t->device.type;
    (*out)->device_id = t->device.id;
    (*out)->managed = owner;
    return FST_OK;
}

static void give_back(dl_managed *managed) {
    if (managed != NULL && managed->deleter != NULL) managed->deleter(managed);
}

void *fst_arena_data(fst_arena *arena) { return arena->data; }

uint64_t fst_arena_bytes(fst_arena *arena) { return arena->bytes; }

void fst_arena_retain(fst_arena *arena) {
    atomic_fetch_add_explicit(&arena->refs, 1, memory_order_relaxed);
}

void fst_arena_unref(fst_arena *arena) {
    if (atomic_fetch_sub_explicit(&arena->refs, 1, memory_order_acq_rel) != 1) return;
    fst_pages_unmap(&arena->pages);
    give_back(arena->managed);
    atomic_fetch_sub(&fst_counts.arenas, 1);
    atomic_fetch_sub(&fst_counts.bytes_ahead, atomic_load(&arena->ahead_bytes));
    if (arena->kind == FST_ARENA_ANONYMOUS) atomic_fetch_sub(&fst_counts.arena_bytes, arena->bytes);
    free(arena);
}

void fst_arena_retain_user(fst_arena *arena) {
    atomic_fetch_add_explicit(&arena->users, 1, memory_order_relaxed);
}

void fst_arena_release_user(fst_arena *arena) {
    if (atomic_fetch_sub_explicit(&arena->users, 1, memory_order_acq_rel) == 1)
        fst_arena_unref(arena);
}

void fst_arena_release(fst_arena **arena) {
    fst_arena *held = *arena;
    *arena = NULL;
    if (held != NULL) fst_arena_release_user(held);
}

bool fst_arena_abandoned(const fst_arena *arena) {
    return atomic_load_explicit(&arena->users, memory_order_acquire) == 0;
}

/* At most the map's size: pages that were evicted and read again count once. */
void fst_arena_count_ahead(fst_arena *arena, uint64_t bytes) {
    unsigned long long before = atomic_load(&arena->ahead_bytes), more;
    do {
        more = fst_min(bytes, arena->bytes - before);
    } while (!atomic_compare_exchange_weak(&arena->ahead_bytes, &before, before + more));
    atomic_fetch_add(&fst_counts.bytes_ahead, more);
}
