/* fake_cuda.c - the cu* functions of the fake device driver.
 *
 * One shared library holds all of the fake; it needs no CUDA headers:
 *
 *   cc -std=c11 -g -O1 -pthread -fPIC -shared -fvisibility=hidden \
 *      native/tests/fake_*.c -o libfake_cuda.so
 *
 * How it behaves, in short (fake_cuda.h has the controls):
 * - Streams hold queues of operations. Nothing runs before an event or stream is waited for,
 *   and then only what that depends on; copies take what is in their source by then.
 * - Device memory is host memory, filled with patterns when it is fresh, freed, or has work
 *   pending. A wait that is missing shows as wrong bytes, or as a violation.
 * - Stricter than the real one: every call on a stream, event or memory needs its own
 *   context to be current, streams must be non-blocking, and an event is good for streams
 *   of its device only.
 */
#include "fake_core.h"

int cuInit(unsigned flags) {
    CALL(cuInit, NEEDS_DRIVER,
         flags != 0          ? INVALID_VALUE
         : fake.devices == 0 ? NO_DEVICE
                             : (fake.initialised = true, OK));
}

int cuDriverGetVersion(int *version) {
    CALL(cuDriverGetVersion, NEEDS_DRIVER,
         version == NULL ? INVALID_VALUE : (*version = 12040, OK));
}

int cuDeviceGetCount(int *count) {
    CALL(cuDeviceGetCount, NEEDS_INIT, count == NULL ? INVALID_VALUE : (*count = fake.devices, OK));
}

int cuDeviceGet(int *device, int ordinal) {
    CALL(cuDeviceGet, NEEDS_INIT,
         device == NULL                    ? INVALID_VALUE
         : device_context(ordinal) == NULL ? INVALID_DEVICE
                                           : (*device = ordinal, OK));
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALL(cuDeviceGetAttribute, NEEDS_INIT,
         device_attribute(value, device,
                          attribute == 18    ? fake.integrated
                          : attribute == 100 ? fake.host_page_tables
                                             : -1));
}

int cuDeviceGetPCIBusId(char *id, int bytes, int device) {
    CALL(cuDeviceGetPCIBusId, NEEDS_INIT, pci_bus_id(id, bytes, device));
}

/* ---- contexts ---- */

int cuDevicePrimaryCtxRetain(uintptr_t *out, int device) {
    CALL(cuDevicePrimaryCtxRetain, NEEDS_INIT, context_retain(device, out));
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    CALL(cuDevicePrimaryCtxRelease_v2, NEEDS_INIT, context_release(device));
}

int cuCtxPushCurrent_v2(uintptr_t handle) {
    CALL(cuCtxPushCurrent_v2, NEEDS_INIT, context_push(handle));
}

int cuCtxPopCurrent_v2(uintptr_t *out) { CALL(cuCtxPopCurrent_v2, NEEDS_INIT, context_pop(out)); }

int cuCtxGetCurrent(uintptr_t *out) {
    CALL(cuCtxGetCurrent, NEEDS_INIT, out == NULL ? INVALID_VALUE : (*out = context_current(), OK));
}

/* ---- streams and events ---- */

int cuStreamCreate(uintptr_t *out, unsigned flags) {
    CALL(cuStreamCreate, NEEDS_CONTEXT, stream_create(context, false, flags, out));
}

int cuStreamDestroy_v2(uintptr_t stream) {
    CALL(cuStreamDestroy_v2, NEEDS_CONTEXT, stream_destroy(context, stream));
}

int cuStreamWaitEvent(uintptr_t stream, uintptr_t event, unsigned flags) {
    CALL(cuStreamWaitEvent, NEEDS_CONTEXT,
         flags != 0 ? INVALID_VALUE : stream_wait(context, stream, event));
}

int cuStreamSynchronize(uintptr_t stream) {
    CALL(cuStreamSynchronize, NEEDS_CONTEXT, stream_synchronize(context, stream));
}

int cuEventCreate(uintptr_t *out, unsigned flags) {
    CALL(cuEventCreate, NEEDS_CONTEXT, flags > 7 ? INVALID_VALUE : event_create(context, out));
}

int cuEventDestroy_v2(uintptr_t event) {
    CALL(cuEventDestroy_v2, NEEDS_CONTEXT, event_destroy(context, event));
}

int cuEventRecord(uintptr_t event, uintptr_t stream) {
    CALL(cuEventRecord, NEEDS_CONTEXT, event_record(context, event, stream));
}

int cuEventQuery(uintptr_t event) {
    CALL(cuEventQuery, NEEDS_CONTEXT, event_query(context, event));
}

int cuEventSynchronize(uintptr_t event) {
    CALL(cuEventSynchronize, NEEDS_CONTEXT, event_synchronize(context, event));
}

/* ---- memory ---- */

int cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    CALL(cuMemHostAlloc, NEEDS_CONTEXT, flags > 7 ? INVALID_VALUE : host_alloc(out, bytes));
}

int cuMemFreeHost(void *base) { CALL(cuMemFreeHost, NEEDS_CONTEXT, host_free(base)); }

int cuMemHostRegister_v2(void *base, size_t bytes, unsigned flags) {
    CALL(cuMemHostRegister_v2, NEEDS_CONTEXT,
         flags > 15 ? INVALID_VALUE : host_register(base, bytes, fake.host_page_tables == 0));
}

int cuMemHostUnregister(void *base) {
    CALL(cuMemHostUnregister, NEEDS_CONTEXT, host_unregister(base));
}

int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, uintptr_t stream) {
    CALL(cuMemcpyHtoDAsync_v2, NEEDS_CONTEXT,
         copy(context, COPY_IN, to, (uintptr_t)from, bytes, stream));
}

int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, uintptr_t stream) {
    CALL(cuMemcpyDtoHAsync_v2, NEEDS_CONTEXT,
         copy(context, COPY_OUT, (uintptr_t)to, from, bytes, stream));
}

int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, uintptr_t stream) {
    CALL(cuMemcpyDtoDAsync_v2, NEEDS_CONTEXT, copy(context, COPY_ON, to, from, bytes, stream));
}

int cuMemAlloc_v2(uintptr_t *out, size_t bytes) {
    CALL(cuMemAlloc_v2, NEEDS_CONTEXT, memory_alloc(context, out, bytes));
}

int cuMemFree_v2(uintptr_t address) {
    CALL(cuMemFree_v2, NEEDS_CONTEXT, memory_free(context, address));
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    CALL(cuMemGetInfo_v2, NEEDS_CONTEXT, memory_info(context, free_bytes, total_bytes));
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
    CALL(cuThreadExchangeStreamCaptureMode, NEEDS_INIT, capture_mode_exchange(mode));
}

/* ---- errors ---- */

static int put(const char *text, const char **out) {
    if (out == NULL) return INVALID_VALUE;
    *out = text;
    return text == NULL ? INVALID_VALUE : OK;
}

static const char *cuda_name(int error) {
    static _Thread_local char name[64];
    if (error_name(error) == NULL) return NULL;
    (void)snprintf(name, sizeof name, "CUDA_%s%s", error == OK ? "" : "ERROR_", error_name(error));
    return name;
}

int cuGetErrorName(int error, const char **out) {
    CALL(cuGetErrorName, NEEDS_NOTHING, put(cuda_name(error), out));
}

int cuGetErrorString(int error, const char **out) {
    CALL(cuGetErrorString, NEEDS_NOTHING, put(error_string(error), out));
}
