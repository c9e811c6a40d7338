/* fake_memory.c - the fake driver's device blocks, registered host memory and copies. */
#include "fake_core.h"

/* ---- blocks ---- */

enum {
    PAGE = 4096,
    TORCH_ALIGNMENT = 512,
    LARGE = 1 << 20 /* from here on cuMemAlloc gives whole pages */
};

static struct block *blocks; /* newest first; freeing makes new */
static uint64_t quarantine_limit, quarantined_bytes;
static int dlpack_type;

int blocks_dlpack_type(void) { return dlpack_type; }

bool quarantine_is_full(void) { return quarantined_bytes > quarantine_limit; }

static struct block **place_of(const struct block *block) {
    struct block **place = &blocks;
    while (*place != NULL && *place != block) place = &(*place)->next;
    return place;
}

static void block_unlink(struct block *block) { *place_of(block) = block->next; }

void block_push(struct block *block) {
    block->next = blocks;
    blocks = block;
}

/* Reads that are still to come have their bytes before. */
static void reads_run(const struct block *block) {
    struct op *op = NULL;
    while ((op = op_touching(op, block->base, block->bytes)) != NULL) {
        if (!op_reads(op, block->base, block->bytes)) continue;
        op_force(op);
        op = NULL; /* the queues have changed */
    }
}

static void usages_end(struct block *block) {
    while (block->usages != NULL) {
        struct usage *usage = block->usages;
        block->usages = usage->next;
        op_release(usage->record);
        free(usage);
    }
}

void block_end(struct block *block) {
    block_unlink(block);
    usages_end(block);
    free(block->memory);
    free(block);
}

struct block *block_holding(uintptr_t base, size_t bytes) {
    for (struct block *block = blocks; block != NULL; block = block->next)
        if (block->state == LIVE && base >= block->base && base - block->base < block->bytes &&
            bytes <= block->bytes - (base - block->base))
            return block;
    return NULL;
}

struct block *block_starting(uintptr_t base) {
    struct block *block = block_holding(base, 1);
    return block != NULL && block->base == base ? block : NULL;
}

bool memory_live(uintptr_t base, size_t bytes, int device) {
    struct block *block = block_holding(base, bytes);
    return block != NULL && (device < 0 || block->context->ordinal == device);
}

static void block_fill(struct block *block, int byte) {
    block->unfilled = fake.free_copies;
    if (!fake.free_copies) memset((void *)block->base, byte, block->bytes);
}

static uint64_t used_bytes(const struct context *context) {
    uint64_t used = 0;
    for (struct block *block = blocks; block != NULL; block = block->next)
        if (block->state == LIVE && block->context == context) used += block->bytes;
    return used;
}

/* ---- quarantine ---- */

static bool all_freed(const unsigned char *bytes, size_t count) {
    return count == 0 || (bytes[0] == FAKE_FREED && memcmp(bytes, bytes + 1, count - 1) == 0);
}

static void block_check(struct block *block) {
    if (block->state != QUARANTINED || block->unfilled) return;
    if (all_freed((void *)block->base, block->bytes)) return;
    violation("block of %zu bytes at %#zx written after it was freed", block->bytes,
              (size_t)block->base);
    block_fill(block, FAKE_FREED); /* reported once */
}

void quarantine_check(void) {
    blocks_awaited();
    for (struct block *block = blocks; block != NULL; block = block->next) block_check(block);
}

static void quarantine_leave(struct block *block) {
    block_check(block);
    quarantined_bytes -= block->capacity;
}

/* Lets the oldest go until no more than a limit is kept, but keeps the newest for reuse. */
static void quarantine_shrink(void) {
    while (quarantined_bytes > quarantine_limit) {
        struct block *newest = NULL, *oldest = NULL;
        for (struct block *block = blocks; block != NULL; block = block->next) {
            if (block->state != QUARANTINED) continue;
            if (newest == NULL) newest = block;
            oldest = block;
        }
        if (oldest == newest) return;
        reads_run(oldest);
        quarantine_leave(oldest);
        block_end(oldest);
    }
}

void quarantine_clear(void) {
    blocks_awaited();
    for (struct block *block = blocks, *next; block != NULL; block = next) {
        next = block->next;
        if (block->state != QUARANTINED) continue;
        reads_run(block);
        quarantine_leave(block);
        block_end(block);
    }
}

/* What torch does: the block freed last is the first to be handed out again, on the stream that
 * it was allocated on, at once: whatever other streams have pending. */
struct block *block_reuse(size_t bytes, const struct stream *stream) {
    for (struct block *block = blocks; block != NULL; block = block->next) {
        if (block->state != QUARANTINED || block->stream != stream || block->capacity < bytes)
            continue;
        quarantine_leave(block);
        block_unlink(block);
        return block;
    }
    return NULL;
}

/* ---- allocating and freeing ---- */

/* Whole pages, or an address that is a multiple of 512 only. */
struct block *block_alloc(struct context *context, size_t bytes, bool pages) {
    size_t shift = pages ? 0 : TORCH_ALIGNMENT;
    void *memory = NULL;
    if (bytes > fake.device_bytes - shift ||
        used_bytes(context) > fake.device_bytes - shift - bytes ||
        posix_memalign(&memory, PAGE, bytes + shift) != 0)
        return NULL;
    struct block *block = zeroed(sizeof *block);
    *block = (struct block){.base = (uintptr_t)memory + shift,
                            .bytes = bytes,
                            .capacity = bytes,
                            .memory = memory,
                            .context = context};
    return block;
}

void block_live(struct block *block) {
    /* What its last owner has still to read is overwritten in the stream's order, not now. */
    bool read_later = op_touching(NULL, block->base, block->bytes) != NULL;
    block->state = LIVE;
    block_push(block);
    if (!read_later) block_fill(block, FAKE_FRESH);
}

int memory_alloc(struct context *context, uintptr_t *out, size_t bytes) {
    if (out == NULL || bytes == 0) return INVALID_VALUE;
    struct block *block = block_alloc(context, bytes, bytes >= LARGE);
    if (block == NULL) return OUT_OF_MEMORY;
    block_live(block);
    *out = block->base;
    return OK;
}

static struct usage *usage_of(const struct block *block, const struct stream *stream) {
    struct usage *usage = block->usages;
    while (usage != NULL && usage->stream != stream) usage = usage->next;
    return usage;
}

/* Nothing may be pending on a block that goes, but what its own stream orders before its next
 * use, and what streams that were recorded on it do. Of these, writes are of no consequence; says
 * whether there are reads. */
static bool block_settle(const struct block *block) {
    bool reads = false;
    struct op *op = NULL;
    while ((op = op_touching(op, block->base, block->bytes)) != NULL) {
        bool own = block->stream != NULL && op->stream == block->stream;
        bool known = own || usage_of(block, op->stream) != NULL;
        if (!known)
            violation("block of %zu bytes freed before a copy that uses it has run", block->bytes);
        if (known && op_reads(op, block->base, block->bytes))
            reads = true;
        else
            op->kind = NOTHING_TO_DO;
    }
    if (file_buffer_within(block->base, block->bytes))
        violation("block of %zu bytes freed while registered with cuFile", block->bytes);
    return reads;
}

/* Whether other streams still use a block that is freed. */
static bool is_awaited(const struct block *block) {
    for (const struct usage *usage = block->usages; usage != NULL; usage = usage->next)
        if (usage->record != NULL && !usage->record->done) return true;
    return false;
}

static void block_quarantine(struct block *block, bool reads) {
    block_unlink(block);
    block_push(block);
    usages_end(block);
    block->state = QUARANTINED;
    if (reads)
        block->unfilled = true;
    else
        block_fill(block, FAKE_FREED);
    quarantined_bytes += block->capacity;
    quarantine_shrink();
}

/* torch records an event on each stream that the block was used on, and gives the block to its
 * next owner when all of them are over. */
void block_free(struct block *block) {
    bool reads = block_settle(block);
    for (struct usage *usage = block->usages; usage != NULL; usage = usage->next) {
        if (usage->stream->head == NULL) continue;
        usage->record = op_submit(usage->stream, RECORD);
        usage->record->references++;
    }
    block->state = AWAITED;
    if (!is_awaited(block)) block_quarantine(block, reads);
}

void blocks_awaited(void) {
    struct block *block = blocks;
    while (block != NULL) {
        if (block->state != AWAITED || is_awaited(block)) {
            block = block->next;
            continue;
        }
        block_quarantine(block, block_settle(block));
        block = blocks; /* others may have gone meanwhile */
    }
}

void block_forget(struct block *block) {
    if (block_settle(block)) reads_run(block);
    block_end(block);
}

int memory_free(struct context *context, uintptr_t address) {
    if (address == 0) return OK;
    struct block *block = block_starting(address);
    if (block == NULL || block->stream != NULL) {
        violation("freed %#zx, which was not allocated or is freed already", (size_t)address);
        return INVALID_VALUE;
    }
    if (block->context != context) {
        violation("memory of device %d freed in device %d's context", block->context->ordinal,
                  context->ordinal);
        return INVALID_HANDLE;
    }
    block_free(block);
    return OK;
}

int memory_info(struct context *context, size_t *free_bytes, size_t *total_bytes) {
    uint64_t used = used_bytes(context);
    if (free_bytes == NULL || total_bytes == NULL) return INVALID_VALUE;
    *total_bytes = fake.device_bytes;
    *free_bytes = used < fake.device_bytes ? fake.device_bytes - used : 0;
    return OK;
}

int device_attribute(int *value, int device, int answer) {
    if (device_context(device) == NULL) return INVALID_DEVICE;
    if (value == NULL || answer < 0) return INVALID_VALUE;
    *value = answer;
    return OK;
}

void fake_unified(int integrated, int host_page_tables) {
    (void)pthread_mutex_lock(&fake.lock);
    fake.integrated = integrated;
    fake.host_page_tables = host_page_tables;
    (void)pthread_mutex_unlock(&fake.lock);
}

/* ---- host memory, registered or of the driver ---- */

struct range {
    struct range *next;
    uintptr_t base;
    size_t bytes;
    bool pinned;
    void *memory; /* the driver's, or NULL: the caller's */
};

static struct range *ranges;

static struct range *range_overlapping(uintptr_t base, size_t bytes) {
    for (struct range *range = ranges; range != NULL; range = range->next)
        if (range->base < base + bytes && base < range->base + range->bytes) return range;
    return NULL;
}

static void range_add(void *base, size_t bytes, bool pinned, void *memory) {
    struct range *range = zeroed(sizeof *range);
    *range = (struct range){ranges, (uintptr_t)base, bytes, pinned, memory};
    ranges = range;
}

static void range_end(struct range **place) {
    struct range *range = *place;
    *place = range->next;
    free(range->memory);
    free(range);
}

/* Ends a range of the driver's memory, or of the caller's. */
static int range_release(void *base, bool drivers) {
    struct range **place = &ranges;
    while (*place != NULL && (*place)->base != (uintptr_t)base) place = &(*place)->next;
    struct range *range = *place;
    if (range == NULL || (range->memory != NULL) != drivers) {
        violation("host memory at %p released, but it is not %s", base,
                  drivers ? "the driver's" : "registered");
        return drivers ? INVALID_VALUE : NOT_REGISTERED;
    }
    /* It will be freed: a pending copy must not touch it any more. */
    struct op *op = NULL;
    while ((op = op_touching(op, range->base, range->bytes)) != NULL) {
        violation("host memory at %p released before a copy that uses it has run", base);
        op->kind = NOTHING_TO_DO;
    }
    range_end(place);
    return OK;
}

int host_alloc(void **out, size_t bytes) {
    if (out == NULL || bytes == 0) return INVALID_VALUE;
    void *memory = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    if (memory == NULL) return OUT_OF_MEMORY;
    memset(memory, FAKE_FRESH, bytes);
    range_add(memory, bytes, true, memory);
    *out = memory;
    return OK;
}

int host_free(void *base) { return range_release(base, true); }

int host_register(void *base, size_t bytes, bool pins) {
    if (base == NULL || bytes == 0) return INVALID_VALUE;
    if (range_overlapping((uintptr_t)base, bytes) != NULL) return ALREADY_REGISTERED;
    range_add(base, bytes, pins, NULL);
    return OK;
}

int host_unregister(void *base) { return range_release(base, false); }

/* ---- copies ---- */

/* One end of a copy on the device. */
static int check_block(const struct context *context, uintptr_t base, size_t bytes) {
    if (memory_live(base, bytes, context->ordinal)) return OK;
    bool other = memory_live(base, bytes, -1);
    violation("copy of %zu bytes at %#zx: %s", bytes, (size_t)base,
              other ? "another device's memory" : "not within a live block");
    return other ? INVALID_HANDLE : INVALID_VALUE;
}

/* The other one on the host. */
static int check_host(uintptr_t base, size_t bytes) {
    struct range *range = range_overlapping(base, bytes);
    if (base == 0) return INVALID_VALUE;
    if (range != NULL && (base < range->base || base + bytes > range->base + range->bytes)) {
        violation("copy of %zu bytes at %#zx: only partly registered", bytes, (size_t)base);
        return INVALID_VALUE;
    }
    fake.pageable_copies += range == NULL || !range->pinned;
    return OK;
}

int copy(struct context *context, enum kind kind, uintptr_t to, uintptr_t from, size_t bytes,
         uintptr_t stream_handle) {
    struct stream *stream = stream_find(context, stream_handle);
    if (stream == NULL) return INVALID_HANDLE;
    if (bytes == 0) return OK;
    int code = kind == COPY_OUT ? check_host(to, bytes) : check_block(context, to, bytes);
    if (code == OK)
        code = kind == COPY_IN ? check_host(from, bytes) : check_block(context, from, bytes);
    if (code != OK) return code;
    if (fake.free_copies) {
        fake.copied_bytes += bytes;
        return OK;
    }
    struct op *op = op_submit(stream, kind);
    op->to = to;
    op->from = from;
    op->bytes = bytes;
    return OK;
}

void op_run(struct op *op) {
    if (op->kind == COPY_STRIDED) {
        op_run_strided(op);
        return;
    }
    const struct context *context = op->stream->context;
    if (op->kind == FILL) memset((void *)op->to, FAKE_LATE, op->bytes);
    if (op->kind != COPY_IN && op->kind != COPY_OUT && op->kind != COPY_ON) return;
    if (op->kind != COPY_OUT && check_block(context, op->to, op->bytes) != OK) return;
    if (op->kind != COPY_IN && check_block(context, op->from, op->bytes) != OK) return;
    memmove((void *)op->to, (const void *)op->from, op->bytes);
    fake.copied_bytes += op->bytes;
}

uint64_t fake_copied_bytes(void) {
    (void)pthread_mutex_lock(&fake.lock);
    uint64_t bytes = fake.copied_bytes;
    (void)pthread_mutex_unlock(&fake.lock);
    return bytes;
}

uint64_t fake_pageable_copies(void) {
    (void)pthread_mutex_lock(&fake.lock);
    uint64_t copies = fake.pageable_copies;
    (void)pthread_mutex_unlock(&fake.lock);
    return copies;
}

/* ---- the whole ---- */

void fake_quarantine(uint64_t bytes) {
    (void)pthread_mutex_lock(&fake.lock);
    quarantine_limit = bytes;
    (void)pthread_mutex_unlock(&fake.lock);
}

void fake_dlpack_device(int type) {
    (void)pthread_mutex_lock(&fake.lock);
    dlpack_type = type;
    (void)pthread_mutex_unlock(&fake.lock);
}

void memory_defaults(void) {
    quarantine_limit = UINT64_C(64) << 20;
    dlpack_type = 1;
}

void memory_reset(void) {
    cancel_all(); /* what is pending on blocks that go */
    quarantine_clear();
    for (struct block *block = blocks, *next; block != NULL; block = next) {
        next = block->next;
        block->state = ORPHAN;
        if (!block->managed) block_end(block);
    }
    while (ranges != NULL) range_end(&ranges);
}

void memory_count(fake_counts *out) {
    blocks_awaited();
    for (struct range *range = ranges; range != NULL; range = range->next) {
        out->ranges++;
        out->range_bytes += range->bytes;
    }
    for (struct block *block = blocks; block != NULL; block = block->next) {
        if (block->state != LIVE) continue;
        out->blocks++;
        out->block_bytes += block->bytes;
    }
}
