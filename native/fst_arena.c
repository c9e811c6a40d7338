/* fst_arena.c - memory that tensors live in. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fst_internal.h"
#include "fst_sys.h"

/* Reading, clearing and copying took 0.6 ms of a core for a MiB in small pages, and 2.4 ms
 * in huge pages that the host had to find first. */
#define SLOW_NANOSECONDS_PER_MIB 1200000u

static int new_arena(enum fst_arena_kind kind, void *data, uint64_t bytes, fst_arena **out,
                     fst_error *err) {
    fst_arena *arena = calloc(1, sizeof *arena);
    if (arena == NULL) return fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory for an arena's record");
    atomic_init(&arena->users, 1);
    atomic_init(&arena->refs, 1);
    arena->kind = kind;
    arena->data = data;
    arena->bytes = bytes;
    atomic_fetch_add(&fst_counts.arenas, 1);
    if (kind == FST_ARENA_ANONYMOUS) atomic_fetch_add(&fst_counts.arena_bytes, bytes);
    *out = arena;
    return FST_OK;
}

int fst_arena_map(fst_file *file, fst_arena **out, fst_error *err) {
    uint64_t bytes = file->info.size;
    *out = NULL;
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
    (*out)->mapped = map;
    (*out)->mapped_bytes = bytes;
    return FST_OK;
}

/* Where a host backs a guest's free memory only when it is touched, whole free blocks are
 * what it has taken back: 1.7 GB filled in huge pages took 2.0 to 3.2 s there, and 0.9 to
 * 1.1 s in small ones, which the kernel cuts from memory freed lately. */
void fst_arena_note_fill(fst_arena *arena, uint64_t bytes, uint64_t cpu_nanoseconds) {
    if (arena->kind != FST_ARENA_ANONYMOUS || bytes < FST_HUGE_PAGE) return;
    if (cpu_nanoseconds < (bytes >> 20) * SLOW_NANOSECONDS_PER_MIB) return;
    if (atomic_exchange(&arena->small_pages, true)) return;
    /* For what is not touched yet; advice only. */
    (void)FST_SYS->madvise(arena->mapped, (size_t)arena->mapped_bytes, MADV_NOHUGEPAGE);
}

int fst_arena_alloc(uint64_t bytes, fst_arena **out, fst_error *err) {
    *out = NULL;
    if (bytes > SIZE_MAX / 2 - 2u * FST_HUGE_PAGE)
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "an arena of %llu bytes cannot be addressed",
                        (unsigned long long)bytes);
    /* Small arenas keep to small pages: a huge page would cost 2 MiB for a scalar. */
    bool huge = bytes >= FST_HUGE_PAGE;
    uint64_t alignment = huge ? FST_HUGE_PAGE : fst_page();
    uint64_t mapped = fst_align_up(bytes == 0 ? 1 : bytes, alignment) + (huge ? alignment : 0);
    unsigned char *map = FST_SYS->mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return fst_fail(err, FST_E_NOMEM, errno, "allocating %llu bytes: %s",
                        (unsigned long long)bytes, strerror(errno));
    unsigned char *data = map;
    if (huge) {
        data = map + (alignment - (uintptr_t)map % alignment) % alignment;
        /* Advice only: refused where huge pages are off, and nothing is lost. */
        (void)FST_SYS->madvise(data, (size_t)(mapped - (uint64_t)(data - map)), MADV_HUGEPAGE);
    }
    int code = new_arena(FST_ARENA_ANONYMOUS, data, bytes, out, err);
    if (code != FST_OK) {
        (void)munmap(map, (size_t)mapped);
        return code;
    }
    (*out)->mapped = map;
    (*out)->mapped_bytes = mapped;
    return FST_OK;
}

int fst_arena_borrow(void *base, uint64_t bytes, fst_arena **out, fst_error *err) {
    *out = NULL;
    return new_arena(FST_ARENA_BORROWED, base, bytes, out, err);
}

void *fst_arena_data(fst_arena *arena) { return arena->data; }

uint64_t fst_arena_bytes(fst_arena *arena) { return arena->bytes; }

void fst_arena_retain(fst_arena *arena) {
    atomic_fetch_add_explicit(&arena->refs, 1, memory_order_relaxed);
}

void fst_arena_unref(fst_arena *arena) {
    if (atomic_fetch_sub_explicit(&arena->refs, 1, memory_order_acq_rel) != 1) return;
    if (arena->mapped != NULL) (void)munmap(arena->mapped, (size_t)arena->mapped_bytes);
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

void fst_arena_release(fst_arena *arena) {
    if (arena != NULL) fst_arena_release_user(arena);
}

bool fst_arena_abandoned(const fst_arena *arena) {
    return atomic_load_explicit(&arena->users, memory_order_acquire) == 0;
}

/* At most the map's size: what was pushed out and read again is there once. */
void fst_arena_count_ahead(fst_arena *arena, uint64_t bytes) {
    unsigned long long before = atomic_load(&arena->ahead_bytes), more;
    do {
        more = fst_min(bytes, arena->bytes - before);
    } while (!atomic_compare_exchange_weak(&arena->ahead_bytes, &before, before + more));
    atomic_fetch_add(&fst_counts.bytes_ahead, more);
}
