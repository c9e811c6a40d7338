/* fake_torch.c - what stands for torch: blocks of its caching allocator, and copies of its own. */
#include "fake_core.h"

/* ---- blocks as the allocator hands them out ---- */

struct managed { /* DLManagedTensor, and what it points to */
    void *data;
    struct {
        int32_t type;
        int32_t id;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code;
        uint8_t bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
    void *manager;
    void (*deleter)(struct managed *self);
    int64_t extent;
};

static void managed_delete(struct managed *managed) {
    struct block *block = managed->manager;
    (void)pthread_mutex_lock(&fake.lock);
    block->managed = false;
    if (block->state == ORPHAN)
        block_end(block);
    else
        block_free(block);
    (void)pthread_mutex_unlock(&fake.lock);
    free(managed);
}

static void leave_work(struct block *block) {
    if (fake.free_copies) return;
    struct op *op = op_submit(block->stream, FILL);
    op->to = block->base;
    op->bytes = block->bytes;
}

static int block_hand_out(uint64_t bytes, int device, uintptr_t stream_handle, void **managed) {
    struct context *context = device_context(device);
    if (context == NULL) return INVALID_DEVICE;
    struct stream *stream = stream_find(context, stream_handle);
    if (stream == NULL) return INVALID_HANDLE;
    if (bytes == 0 || managed == NULL) return INVALID_VALUE;
    struct block *block = NULL;
    blocks_awaited();
    if (quarantine_is_full()) block = block_reuse(bytes, stream);
    if (block == NULL) block = block_alloc(context, bytes, false);
    if (block == NULL) return OUT_OF_MEMORY;
    block->bytes = bytes;
    block->stream = stream;
    block->managed = true;
    block_live(block);
    leave_work(block);
    struct managed *made = zeroed(sizeof *made);
    made->data = (void *)block->base;
    made->device.type = blocks_dlpack_type();
    made->device.id = made->device.type == 1 ? 0 : device;
    made->dimensions = 1;
    made->dtype.code = 1; /* unsigned */
    made->dtype.bits = 8;
    made->dtype.lanes = 1;
    made->extent = (int64_t)bytes;
    made->shape = &made->extent;
    made->manager = block;
    made->deleter = managed_delete;
    *managed = made;
    return OK;
}

int fake_block(uint64_t bytes, int device, uintptr_t stream, void **managed) {
    (void)pthread_mutex_lock(&fake.lock);
    int code = block_hand_out(bytes, device, stream, managed);
    (void)pthread_mutex_unlock(&fake.lock);
    return code;
}

static int block_note(void *memory, uint64_t bytes, int device, uintptr_t stream_handle) {
    struct context *context = device_context(device);
    if (context == NULL) return INVALID_DEVICE;
    struct stream *stream = stream_find(context, stream_handle);
    if (stream == NULL) return INVALID_HANDLE;
    if (memory == NULL || bytes == 0) return INVALID_VALUE;
    if (block_holding((uintptr_t)memory, 1) != NULL) return ALREADY_REGISTERED;
    struct block *block = zeroed(sizeof *block);
    block->base = (uintptr_t)memory;
    block->bytes = bytes;
    block->context = context;
    block->stream = stream;
    block_push(block);
    leave_work(block);
    return OK;
}

int fake_note(void *memory, uint64_t bytes, int device, uintptr_t stream) {
    (void)pthread_mutex_lock(&fake.lock);
    int code = block_note(memory, bytes, device, stream);
    (void)pthread_mutex_unlock(&fake.lock);
    return code;
}

int fake_forget(void *memory) {
    (void)pthread_mutex_lock(&fake.lock);
    struct block *block = block_starting((uintptr_t)memory);
    bool noted = block != NULL && block->memory == NULL;
    if (noted) block_forget(block);
    (void)pthread_mutex_unlock(&fake.lock);
    return noted ? OK : INVALID_VALUE;
}

/* ---- streams ---- */

static int usage_note(uintptr_t memory, uintptr_t stream_handle) {
    struct block *block = block_holding(memory, 1);
    if (block == NULL || block->stream == NULL) return INVALID_VALUE;
    struct stream *stream = stream_find(block->context, stream_handle);
    if (stream == NULL) return INVALID_HANDLE;
    if (stream == block->stream) return OK;
    for (struct usage *usage = block->usages; usage != NULL; usage = usage->next)
        if (usage->stream == stream) return OK;
    struct usage *usage = zeroed(sizeof *usage);
    *usage = (struct usage){.next = block->usages, .stream = stream};
    block->usages = usage;
    return OK;
}

int fake_record_stream(uintptr_t memory, uintptr_t stream) {
    (void)pthread_mutex_lock(&fake.lock);
    int code = usage_note(memory, stream);
    (void)pthread_mutex_unlock(&fake.lock);
    return code;
}

int fake_synchronize(int device, uintptr_t stream_handle) {
    (void)pthread_mutex_lock(&fake.lock);
    struct context *context = device_context(device);
    int code = context == NULL ? INVALID_DEVICE : stream_synchronize(context, stream_handle);
    (void)pthread_mutex_unlock(&fake.lock);
    return code;
}

/* ---- copies ---- */

enum {
    MAX_DIMS = 8
};

struct strided {
    int dims;
    size_t itemsize;
    int64_t shape[MAX_DIMS];
    int64_t strides[MAX_DIMS]; /* of the source, in bytes, none negative */
};

static int strided_submit(uintptr_t to, uintptr_t from, const struct strided *how, int device,
                          uintptr_t stream_handle) {
    struct context *context = device_context(device);
    if (context == NULL) return INVALID_DEVICE;
    struct stream *stream = stream_find(context, stream_handle);
    if (stream == NULL) return INVALID_HANDLE;
    size_t bytes = how->itemsize, from_bytes = how->itemsize;
    for (int i = 0; i < how->dims; i++) {
        if (how->shape[i] <= 0) return how->shape[i] == 0 ? OK : INVALID_VALUE;
        bytes *= (size_t)how->shape[i];
        from_bytes += (size_t)((how->shape[i] - 1) * how->strides[i]);
    }
    if (!memory_live(to, bytes, device) || !memory_live(from, from_bytes, device)) {
        violation("torch's copy of %zu bytes: not within live blocks", bytes);
        return INVALID_VALUE;
    }
    if (fake.free_copies) return OK;
    struct op *op = op_submit(stream, COPY_STRIDED);
    op->to = to;
    op->from = from;
    op->bytes = bytes;
    op->from_bytes = from_bytes;
    op->strided = zeroed(sizeof *how);
    *op->strided = *how;
    return OK;
}

int fake_copy_strided(uintptr_t to, uintptr_t from, int dims, const int64_t *shape,
                      const int64_t *strides, uint64_t itemsize, int device, uintptr_t stream) {
    struct strided how = {.dims = dims, .itemsize = (size_t)itemsize};
    if (dims < 0 || dims > MAX_DIMS || itemsize == 0) return INVALID_VALUE;
    for (int i = 0; i < dims; i++) {
        if (strides[i] < 0) return INVALID_VALUE;
        how.shape[i] = shape[i];
        how.strides[i] = strides[i] * (int64_t)itemsize;
    }
    (void)pthread_mutex_lock(&fake.lock);
    int code = strided_submit(to, from, &how, device, stream);
    (void)pthread_mutex_unlock(&fake.lock);
    return code;
}

static void copy_elements(const struct strided *how, int dim, unsigned char **to,
                          const unsigned char *from) {
    if (dim == how->dims) {
        memcpy(*to, from, how->itemsize);
        *to += how->itemsize;
        return;
    }
    for (int64_t i = 0; i < how->shape[dim]; i++)
        copy_elements(how, dim + 1, to, from + i * how->strides[dim]);
}

/* It may read memory that has another owner by now: then a test sees wrong bytes. */
void op_run_strided(const struct op *op) {
    unsigned char *to = (unsigned char *)op->to;
    copy_elements(op->strided, 0, &to, (const unsigned char *)op->from);
}
