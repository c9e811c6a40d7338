/* fst_dlpack.h - the parts of the DLPack 1.x ABI that the engine speaks.
 *
 * Layouts follow https://dmlc.github.io/dlpack/latest/c_api.html; DLPack keeps them
 * stable within a major version.
 */
#pragma once

#include <stdint.h>

enum {
    DL_CPU = 1,
    DL_CUDA = 2,
    DL_ROCM = 10
};
enum {
    DL_UINT = 1
};

typedef struct dl_device {
    int32_t type;
    int32_t id;
} dl_device;

typedef struct dl_dtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} dl_dtype;

typedef struct dl_tensor {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed { /* capsule "dltensor" */
    dl_tensor tensor;
    void *manager;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

typedef struct dl_version {
    uint32_t major;
    uint32_t minor;
} dl_version;

typedef struct dl_managed_versioned { /* capsule "dltensor_versioned", exchange API */
    dl_version version;
    void *manager;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned;

/* What `torch.Tensor.__dlpack_c_exchange_api__` points to (DLPack 1.2 and later). */
typedef struct dl_exchange_api {
    dl_version version;
    struct dl_exchange_api *previous;
    void *allocate;
    void *from_object;
    int (*to_object)(dl_managed_versioned *tensor, void **out); /* steals the tensor */
    void *view_object;
    void *work_stream;
} dl_exchange_api;
