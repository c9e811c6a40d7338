/* fst_arena.h - memory that tensors live in; who holds it is drawn in fst.h. */
#pragma once

#include "base/fst_pages.h"

enum fst_arena_kind {
    FST_ARENA_MAP,
    FST_ARENA_ANONYMOUS,
    FST_ARENA_BORROWED,
    FST_ARENA_ADOPTED
};

struct fst_arena {
    atomic_uint users;         /* creator and batches of tensors */
    atomic_uint refs;          /* one for all users together, one for each job */
    atomic_ullong ahead_bytes; /* of a map: read ahead into the page cache for its users */
    atomic_ullong fill_bytes;  /* since fst_arena_note_fill last decided */
    atomic_ullong fill_nanoseconds;
    atomic_bool small_pages; /* what is not filled yet gets small pages */
    atomic_bool kept;        /* fst_arena_keep_to is in force */
    enum fst_arena_kind kind;
    unsigned char *data;
    uint64_t bytes;
    fst_pages pages;     /* what is to be unmapped; of borrowed memory, nothing */
    int32_t device_type; /* DLPack's; the CPU's for all but adopted memory */
    int32_t device_id;
    void *managed; /* of adopted memory: the DLManagedTensor */
};

void fst_arena_retain_user(fst_arena *arena);
void fst_arena_release_user(fst_arena *arena);
/* A job's hold: it keeps the memory, but read-ahead for the arena still stops without users. */
void fst_arena_retain(fst_arena *arena);
void fst_arena_unref(fst_arena *arena);
bool fst_arena_abandoned(const fst_arena *arena);
/* Records how much processor time it took to read into part of an arena: see fst_arena.c. */
void fst_arena_note_fill(fst_arena *arena, uint64_t bytes, uint64_t cpu_nanoseconds);
/* The same of a page fault alone. */
void fst_arena_note_touch(fst_arena *arena, uint64_t bytes, uint64_t cpu_nanoseconds);
void fst_arena_count_ahead(fst_arena *arena, uint64_t bytes);
/* Undoes fst_arena_keep_to, where it was called: nothing more will be read ahead. */
void fst_arena_keep_no_more(fst_arena *map);
