/* fst_ring.c - the slots that copies to devices start from.
 *
 * A slot is pinned when a worker needs one and none is free, and is kept for the next load: pinning
 * runs at 1 to 2 GB/s, so a ring of 64 MiB costs some 50 ms once. A system may refuse to pin at any
 * slot (RLIMIT_MEMLOCK, a container's limit): the load goes on with the slots it has, and with
 * ordinary memory if it has none.
 *
 * Slots are not inherited by children (MADV_DONTFORK): after a fork, a write by the parent would
 * give the process another page than the one that the device reads.
 *
 * On CUDA devices that read by the host's page tables (Grace Hopper, GB10) cuMemHostRegister pins
 * nothing, as NVIDIA documents. There the driver allocates the slots, as it does for torch's pinned
 * tensors: docs/devices.md has the measurements of others. A fork does no harm to these: the device
 * follows the page tables of this process.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/fst_sys.h"
#include "device/fst_ring.h"

/* CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTALLOC_PORTABLE, hipHostRegisterPortable: any context */
#define PORTABLE 1u
#define PREFERRED 1 /* MPOL_PREFERRED: near the device, elsewhere if need be */
#define NODES_MAX 1024

static struct {
    pthread_mutex_t lock;
    pthread_cond_t given;
    fst_slot *spare;
    uint64_t slots; /* in all: spare and in use */
    uint64_t pinned_bytes;
    uint64_t pinned_nanoseconds;
    bool refused; /* pinning more has failed; tried again once the ring was cleared */
} ring = {.lock = PTHREAD_MUTEX_INITIALIZER, .given = PTHREAD_COND_INITIALIZER};

static pthread_once_t forks_watched = PTHREAD_ONCE_INIT;

/* In the child slots are not mapped, and their addresses may soon mean something else: they
 * are forgotten, not unmapped. */
static void after_fork_child(void) {
    (void)pthread_mutex_init(&ring.lock, NULL);
    (void)pthread_cond_init(&ring.given, NULL);
    ring.spare = NULL;
    ring.slots = ring.pinned_bytes = 0;
    ring.refused = false;
}

static void watch_forks(void) { (void)pthread_atfork(NULL, NULL, after_fork_child); }

/* For the functions that others call without holding a slot. */
static void lock_first(void) {
    (void)pthread_once(&forks_watched, watch_forks);
    (void)pthread_mutex_lock(&ring.lock);
}

static void near(const fst_device *device, const fst_pages *pages) {
    unsigned long mask[NODES_MAX / (8 * sizeof(unsigned long))] = {0};
    int node = device->numa_node;
    if (node < 0 || node >= NODES_MAX) return;
    mask[(size_t)node / (8 * sizeof *mask)] = 1ul << ((size_t)node % (8 * sizeof *mask));
    (void)syscall(SYS_mbind, pages->map, pages->map_bytes, PREFERRED, mask, NODES_MAX, 0);
}

static bool registering_pins(const fst_device *device) {
    return device->gpu->kind != FST_GPU_CUDA ||
           !fst_gpu_memory_is(device, FST_GPU_HOST_PAGE_TABLES);
}

static int allocate(const fst_gpu *gpu, fst_pages *pages) {
    void *memory = NULL;
    int status = gpu->host_alloc(&memory, (size_t)pages->bytes, PORTABLE);
    pages->data = memory;
    return status;
}

static bool pin(fst_device *device, fst_slot *slot) {
    fst_gpu_scope scope;
    fst_error ignored = {0};
    const fst_gpu *gpu = device->gpu;
    fst_pages *pages = &slot->pages;
    uint64_t begin = fst_nanoseconds(CLOCK_MONOTONIC);
    if (fst_gpu_enter(device, &scope, &ignored) != FST_OK) return false;
    int status = slot->drivers ? allocate(gpu, pages)
                               : gpu->host_register(pages->data, (size_t)pages->bytes, PORTABLE);
    fst_gpu_leave(&scope);
    uint64_t took = fst_nanoseconds(CLOCK_MONOTONIC) - begin;
    (void)pthread_mutex_lock(&ring.lock);
    ring.pinned_nanoseconds += took;
    (void)pthread_mutex_unlock(&ring.lock);
    return status == 0;
}

static bool unpin(fst_slot *slot) {
    fst_gpu_scope scope;
    fst_error ignored = {0};
    if (fst_gpu_enter_surely(slot->device, &scope, &ignored) != FST_OK) return false;
    const fst_gpu *gpu = slot->device->gpu;
    int status =
        slot->drivers ? gpu->host_free(slot->pages.data) : gpu->host_unregister(slot->pages.data);
    fst_gpu_leave(&scope);
    return status == 0;
}

/* Memory that the driver does not unpin stays mapped: nothing else could be pinned at its address,
 * and a device may still read there. */
static void destroy(fst_slot *slot) {
    bool released = !slot->pinned || unpin(slot);
    if (released && !slot->drivers) fst_pages_unmap(&slot->pages);
    free(slot);
}

static fst_slot *create(fst_device *device, uint64_t bytes, bool pinned) {
    fst_slot *slot = calloc(1, sizeof *slot);
    if (slot == NULL) return NULL;
    slot->device = device;
    slot->drivers = pinned && !registering_pins(device);
    if (slot->drivers) {
        slot->pages.bytes = bytes;
        slot->pinned = pin(device, slot);
    } else if (fst_pages_map(&slot->pages, bytes) == 0) {
        near(device, &slot->pages);
        bool apart = FST_SYS->madvise(slot->pages.map, (size_t)slot->pages.map_bytes,
                                      MADV_DONTFORK) == 0; /* without it, none may be pinned */
        slot->pinned = pinned && apart && pin(device, slot);
    } else {
        free(slot);
        return NULL;
    }
    if (slot->pinned == pinned) return slot;
    destroy(slot);
    return NULL;
}

/* With the lock held: finds a spare slot, pinned or not. *useless becomes a spare slot that is too
 * small, or of another driver. */
static fst_slot *pick(const fst_device *device, uint64_t bytes, bool pinned, fst_slot **useless) {
    fst_slot **best = NULL;
    *useless = NULL;
    for (fst_slot **link = &ring.spare; *link != NULL; link = &(*link)->next) {
        const fst_slot *slot = *link;
        if (slot->pinned != pinned) continue;
        if (slot->device->gpu != device->gpu || slot->pages.bytes < bytes) {
            *useless = *link;
            continue;
        }
        bool nearer = slot->device->numa_node == device->numa_node &&
                      (best == NULL || (*best)->device->numa_node != device->numa_node);
        if (best == NULL || nearer) best = link;
    }
    if (best == NULL) return NULL;
    fst_slot *slot = *best;
    *best = slot->next;
    slot->next = NULL;
    return slot;
}

static void unlink_spare(fst_slot *slot) {
    fst_slot **link = &ring.spare;
    while (*link != slot) link = &(*link)->next;
    *link = slot->next;
    ring.slots--;
    if (slot->pinned) ring.pinned_bytes -= slot->pages.bytes;
}

/* With the lock held, which it lets go of meanwhile: makes room for pinning another. */
static void discard(fst_slot *spare) {
    unlink_spare(spare);
    (void)pthread_mutex_unlock(&ring.lock);
    destroy(spare);
    (void)pthread_mutex_lock(&ring.lock);
    ring.refused = false;
}

/* With the lock held, which it lets go of meanwhile: one more slot, counted beforehand. */
static fst_slot *grow(fst_device *device, uint64_t bytes, bool pinned) {
    ring.slots++;
    if (pinned) ring.pinned_bytes += bytes;
    (void)pthread_mutex_unlock(&ring.lock);
    fst_slot *slot = create(device, bytes, pinned);
    (void)pthread_mutex_lock(&ring.lock);
    if (slot != NULL) return slot;
    ring.slots--;
    if (pinned) {
        ring.pinned_bytes -= bytes;
        ring.refused = true;
    }
    (void)pthread_cond_broadcast(&ring.given); /* waiters look again */
    return NULL;
}

/* With the lock held, which it may let go of meanwhile. It then looks again, since a slot may have
 * been given back in that time. */
static fst_slot *take(fst_device *device, uint64_t bytes, uint64_t pinned_limit) {
    fst_slot *useless, *slot;
    for (;;) {
        slot = pick(device, bytes, true, &useless);
        if (slot != NULL) return slot;
        uint64_t pinned = ring.pinned_bytes;
        if (!ring.refused && pinned <= pinned_limit && bytes <= pinned_limit - pinned) {
            slot = grow(device, bytes, true);
            if (slot != NULL) return slot;
        } else if (useless != NULL) {
            discard(useless);
        } else {
            break;
        }
    }
    /* There is no pinned slot to wait for: use ordinary memory. */
    if (ring.pinned_bytes > 0) return NULL;
    slot = pick(device, bytes, false, &useless);
    if (slot != NULL) return slot;
    if (useless != NULL) discard(useless);
    return grow(device, bytes, false);
}

int fst_ring_take(fst_device *device, uint64_t bytes, uint64_t pinned_limit, bool wait,
                  fst_slot **out, fst_error *err) {
    int code = FST_OK;
    lock_first();
    *out = take(device, fst_align_up(bytes, fst_page()), pinned_limit);
    if (*out == NULL && ring.slots == 0)
        code = fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory for a slot of %llu bytes",
                        (unsigned long long)bytes);
    else if (*out == NULL) {
        code = FST_PENDING;
        struct timespec until;
        (void)clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 1; /* the caller looks whether its load was cancelled */
        if (wait) (void)pthread_cond_timedwait(&ring.given, &ring.lock, &until);
    }
    (void)pthread_mutex_unlock(&ring.lock);
    return code;
}

void fst_ring_give(fst_slot *slot) {
    if (slot == NULL) return;
    (void)pthread_mutex_lock(&ring.lock);
    slot->next = ring.spare;
    ring.spare = slot;
    (void)pthread_cond_broadcast(&ring.given);
    (void)pthread_mutex_unlock(&ring.lock);
}

void fst_ring_clear(void) {
    for (;;) {
        lock_first();
        fst_slot *slot = ring.spare;
        if (slot != NULL) unlink_spare(slot);
        ring.refused = false;
        (void)pthread_mutex_unlock(&ring.lock);
        if (slot == NULL) return;
        destroy(slot);
    }
}

void fst_ring_stats(uint64_t *pinned_bytes, uint64_t *pinned_nanoseconds) {
    lock_first();
    *pinned_bytes = ring.pinned_bytes;
    *pinned_nanoseconds = ring.pinned_nanoseconds;
    (void)pthread_mutex_unlock(&ring.lock);
}
