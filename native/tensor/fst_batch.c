/* fst_batch.c - DLPack descriptions of many tensors in one block.
 *
 *   [ fst_batch | element 0 | element 1 | ... | dims ... | strides ... ]
 *
 * An element is a plain and a versioned DLPack struct side by side; a consumer gets one of them.
 * All elements and the creator share one count: the last tensor frees the block and drops its
 * reference to the arena. Deleters run on any thread, without the GIL, during and after the
 * interpreter's shutdown; they touch two atomics and, at the end, free and munmap.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tensor/fst_batch.h"

typedef struct element {
    dl_managed plain;
    dl_managed_versioned versioned;
} element;

struct fst_batch {
    atomic_ullong alive;
    fst_arena *arena;
    element elements[];
};

void fst_batch_drop(fst_batch *batch, uint64_t elements) {
    if (elements == 0) return;
    if (atomic_fetch_sub_explicit(&batch->alive, elements, memory_order_acq_rel) != elements)
        return;
    fst_arena_release_user(batch->arena);
    free(batch);
}

/* A cleared manager shows the creator, which holds the block, that a deleter has run. */
static void delete_plain(dl_managed *self) {
    fst_batch *batch = self->manager;
    self->manager = NULL;
    fst_batch_drop(batch, 1);
}

static void delete_versioned(dl_managed_versioned *self) {
    fst_batch *batch = self->manager;
    self->manager = NULL;
    fst_batch_drop(batch, 1);
}

dl_managed_versioned *fst_batch_versioned(fst_batch *batch, uint64_t i) {
    return &batch->elements[i].versioned;
}

dl_managed *fst_batch_plain(fst_batch *batch, uint64_t i) { return &batch->elements[i].plain; }

/* Row-major strides in elements; torch wants at least 1 where a dimension is empty. */
static void contiguous_strides(const int64_t *shape, uint32_t ndim, int64_t *strides) {
    int64_t stride = 1;
    for (uint32_t d = ndim; d-- > 0;) {
        strides[d] = stride;
        stride *= shape[d] > 1 ? shape[d] : 1; /* cannot overflow: see tensor_bytes */
    }
}

static void describe(fst_batch *batch, uint64_t i, const fst_layout_view *view,
                     const fst_tensor *tensor, uint64_t offset, fst_dl_dtype dtype, int64_t *shape,
                     int64_t *strides) {
    element *e = &batch->elements[i];
    dl_tensor *t = &e->plain.tensor;
    uint64_t bytes = tensor->end - tensor->begin;
    if (dtype.as_bytes) {
        t->ndim = 1;
        shape[0] = (int64_t)bytes;
        t->dtype = (dl_dtype){DL_UINT, 8, 1};
    } else {
        t->ndim = (int32_t)tensor->ndim;
        if (tensor->ndim > 0) /* a file of scalars has no dims at all */
            memcpy(shape, view->dims + tensor->dims_index, tensor->ndim * sizeof *shape);
        t->dtype = (dl_dtype){dtype.code, dtype.bits, 1};
    }
    contiguous_strides(shape, (uint32_t)t->ndim, strides);
    t->data = batch->arena->data + offset;
    t->device = (dl_device){batch->arena->device_type, batch->arena->device_id};
    t->shape = shape;
    t->strides = strides;
    e->versioned.tensor = *t;
    e->versioned.version = (dl_version){1, 0};
    e->plain.manager = e->versioned.manager = batch;
    e->plain.deleter = delete_plain;
    e->versioned.deleter = delete_versioned;
}

/* Room for dims of the tensors named, at least one each: as_bytes makes them 1-D. */
static bool dims_room(const fst_layout_view *view, const uint64_t *which, uint64_t count,
                      uint64_t *out) {
    uint64_t room = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t index = which == NULL ? i : which[i];
        if (index >= view->count) return false;
        uint32_t ndim = view->tensors[index].ndim;
        room += ndim == 0 ? 1 : ndim; /* at most 64 each */
    }
    *out = room;
    return true;
}

int fst_batch_create(fst_arena *arena, const fst_layout_view *view, const uint64_t *which,
                     uint64_t count, const uint64_t *offsets, uint64_t file_base,
                     const fst_dl_dtype *table, fst_batch **out, fst_error *err) {
    uint64_t room;
    *out = NULL;
    if (count == 0 || !dims_room(view, which, count, &room))
        return fst_fail(err, FST_E_INVALID, EINVAL, "no such tensor in the layout");
    size_t elements_bytes, dims_bytes, bytes;
    if (__builtin_mul_overflow((size_t)count, sizeof(element), &elements_bytes) ||
        __builtin_mul_overflow((size_t)room, 2 * sizeof(int64_t), &dims_bytes) ||
        __builtin_add_overflow(elements_bytes, dims_bytes, &bytes) ||
        __builtin_add_overflow(bytes, sizeof(fst_batch), &bytes))
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "%llu tensors at once are too many",
                        (unsigned long long)count);
    fst_batch *batch = calloc(1, bytes);
    if (batch == NULL)
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory to describe %llu tensors",
                        (unsigned long long)count);
    int64_t *dims = (int64_t *)(void *)&batch->elements[count];
    batch->arena = arena;
    atomic_init(&batch->alive, count + 1);
    for (uint64_t i = 0; i < count; i++) {
        const fst_tensor *tensor = &view->tensors[which == NULL ? i : which[i]];
        uint64_t offset = offsets == NULL ? file_base + tensor->begin : offsets[i];
        uint64_t length = tensor->end - tensor->begin;
        if (!table[tensor->dtype].known || offset > arena->bytes ||
            length > arena->bytes - offset) {
            bool known = table[tensor->dtype].known;
            free(batch);
            return known ? fst_fail(err, FST_E_INVALID, EINVAL, "a tensor lies outside its arena")
                         : fst_fail(err, FST_FALLBACK, 0, "this torch has no dtype for a tensor");
        }
        uint64_t own = tensor->ndim == 0 ? 1 : tensor->ndim;
        describe(batch, i, view, tensor, offset, table[tensor->dtype], dims, dims + own);
        dims += 2 * own;
    }
    fst_arena_retain_user(arena);
    *out = batch;
    return FST_OK;
}
