/* preload_malloc.c - fails the n-th allocation that one shared object makes, and counts what it
 * holds. tests/support/fault_matrix.py loads it by LD_PRELOAD; what others allocate passes.
 *
 * A call belongs to the object if it returns into the object's code. Needs glibc, whose allocator
 * has second names.
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *old, size_t bytes);
void __libc_free(void *block);

enum { /* what can fail: numbers of fault_arm */
    MEMORY,
    FILES, /* fopen: files of /proc and /sys */
    KINDS
};

static atomic_uintptr_t code_begin, code_end;
static struct {
    atomic_ullong calls, first, last;
} kinds[KINDS];

/* What the object holds: addresses, and sizes of maps. Others may free it: a function of the object
 * that ends in free() jumps there, and then the call returns to its caller. */
enum {
    PLACES = 1 << 14,
    NEAR = 64 /* places looked at for an address */
};
typedef struct holding {
    atomic_uintptr_t at[PLACES];
    atomic_ullong bytes[PLACES];
    atomic_llong sum;
} holding;
static holding blocks, maps;

enum {
    SITES = 128
};
static atomic_uintptr_t sites[SITES]; /* where allocations return to; 0 ends them */

/* ---- for the tests ---- */

void fault_watch(uintptr_t begin, uintptr_t end) {
    atomic_store(&code_begin, begin);
    atomic_store(&code_end, end);
}

/* Makes calls first .. first+count-1 (from 1, from now) of a kind fail; first 0: none. */
void fault_arm(int kind, uint64_t first, uint64_t count) {
    atomic_store(&kinds[kind].first, 0);
    atomic_store(&kinds[kind].calls, 0);
    atomic_store(&kinds[kind].last, first + count - 1);
    atomic_store(&kinds[kind].first, first);
}

uint64_t fault_seen(int kind) { return atomic_load(&kinds[kind].calls); }

/* Blocks allocated and not freed, and bytes mapped and not unmapped, by the object. */
int64_t fault_blocks(void) { return atomic_load(&blocks.sum); }
int64_t fault_mapped(void) { return atomic_load(&maps.sum); }

uintptr_t fault_site(int i) { return i < SITES ? atomic_load(&sites[i]) : 0; }

/* ---- what is in the C library's place ---- */

static bool ours(const void *caller) {
    uintptr_t at = (uintptr_t)caller;
    return at >= atomic_load(&code_begin) && at < atomic_load(&code_end);
}

static bool fails(int kind) {
    uint64_t number = atomic_fetch_add(&kinds[kind].calls, 1) + 1;
    uint64_t first = atomic_load(&kinds[kind].first);
    return first != 0 && number >= first && number <= atomic_load(&kinds[kind].last);
}

/* One more block of the object's, unless it is to fail. */
static bool allows(const void *caller) {
    for (int i = 0; i < SITES; i++) {
        uintptr_t none = 0;
        if (atomic_load(&sites[i]) == (uintptr_t)caller ||
            atomic_compare_exchange_strong(&sites[i], &none, (uintptr_t)caller))
            break;
    }
    if (fails(MEMORY)) {
        errno = ENOMEM;
        return false;
    }
    return true;
}

/* Maps lie at multiples of megabytes: the product's upper bits tell them apart. */
static size_t place_of(uintptr_t address) {
    return (size_t)(((uint64_t)address * UINT64_C(0x9E3779B97F4A7C15)) >> 32) % PLACES;
}

static void hold(holding *held, const void *what, uint64_t size) {
    uintptr_t address = (uintptr_t)what;
    if (address == 0) return;
    for (size_t i = 0; i < NEAR; i++) {
        size_t place = (place_of(address) + i) % PLACES;
        uintptr_t none = 0;
        if (!atomic_compare_exchange_strong(&held->at[place], &none, address)) continue;
        atomic_store(&held->bytes[place], size);
        atomic_fetch_add(&held->sum, (int64_t)size);
        return;
    }
    (void)fputs("preload_malloc: too many blocks\n", stderr);
    abort();
}

static bool let_go(holding *held, const void *what) {
    uintptr_t address = (uintptr_t)what;
    for (size_t i = 0; i < NEAR && address != 0; i++) {
        size_t place = (place_of(address) + i) % PLACES;
        if (atomic_load(&held->at[place]) != address) continue;
        atomic_fetch_sub(&held->sum, (int64_t)atomic_load(&held->bytes[place]));
        atomic_store(&held->at[place], 0);
        return true;
    }
    return false;
}

static void *counted(void *block) {
    hold(&blocks, block, 1);
    return block;
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t bytes) {
    if (!ours(CALLER)) return __libc_malloc(bytes);
    return allows(CALLER) ? counted(__libc_malloc(bytes)) : NULL;
}

void *calloc(size_t count, size_t bytes) {
    if (!ours(CALLER)) return __libc_calloc(count, bytes);
    return allows(CALLER) ? counted(__libc_calloc(count, bytes)) : NULL;
}

void *realloc(void *old, size_t bytes) {
    if (!ours(CALLER)) return __libc_realloc(old, bytes);
    if (!allows(CALLER)) return NULL;
    (void)let_go(&blocks, old);
    void *moved = __libc_realloc(old, bytes);
    (void)counted(moved != NULL ? moved : old);
    return moved;
}

char *strdup(const char *text) {
    size_t bytes = strlen(text) + 1;
    bool watched = ours(CALLER);
    if (watched && !allows(CALLER)) return NULL;
    char *copy = __libc_malloc(bytes);
    if (watched) (void)counted(copy);
    return copy == NULL ? NULL : memcpy(copy, text, bytes);
}

void free(void *block) {
    (void)let_go(&blocks, block);
    __libc_free(block);
}

/* C has no conversion from what dlsym returns to a function. */
static void find(void *function, const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    memcpy(function, &found, sizeof found);
}

typedef void *map_function(void *, size_t, int, int, int, off_t);
typedef int unmap_function(void *, size_t);
typedef FILE *open_function(const char *, const char *);

static void *map(const void *caller, void *hint, size_t bytes, int protection, int flags, int fd,
                 off_t offset) {
    static map_function *next;
    if (next == NULL) find(&next, "mmap64");
    void *at = next(hint, bytes, protection, flags, fd, offset);
    if (at != MAP_FAILED && ours(caller)) hold(&maps, at, bytes);
    return at;
}

void *mmap(void *hint, size_t bytes, int protection, int flags, int fd, off_t offset) {
    return map(CALLER, hint, bytes, protection, flags, fd, offset);
}

void *mmap64(void *hint, size_t bytes, int protection, int flags, int fd, off_t offset) {
    return map(CALLER, hint, bytes, protection, flags, fd, offset);
}

int munmap(void *at, size_t bytes) {
    static unmap_function *next;
    if (next == NULL) find(&next, "munmap");
    (void)let_go(&maps, at);
    return next(at, bytes);
}

static FILE *open_file(const void *caller, const char *path, const char *mode) {
    static open_function *next;
    if (next == NULL) find(&next, "fopen64");
    if (!ours(caller) || !fails(FILES)) return next(path, mode);
    errno = ENOMEM;
    return NULL;
}

FILE *fopen(const char *path, const char *mode) { return open_file(CALLER, path, mode); }
FILE *fopen64(const char *path, const char *mode) { return open_file(CALLER, path, mode); }
