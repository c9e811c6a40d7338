/* fake_hip.c - the hip* functions of the fake device driver. */
#include "fake_core.h"

int hipInit(unsigned flags) { CALL(hipInit, NEEDS_HIP, flags != 0 ? INVALID_VALUE : OK); }

int hipDriverGetVersion(int *version) {
    CALL(hipDriverGetVersion, NEEDS_DRIVER,
         version == NULL ? INVALID_VALUE : (*version = 60300000, OK));
}

int hipGetDeviceCount(int *count) {
    if (count != NULL) *count = 0;
    CALL(hipGetDeviceCount, NEEDS_HIP, count == NULL ? INVALID_VALUE : (*count = fake.devices, OK));
}

int hipGetDevice(int *device) {
    CALL(hipGetDevice, NEEDS_HIP, device == NULL ? INVALID_VALUE : (*device = *hip_device(), OK));
}

int hipSetDevice(int device) {
    CALL(hipSetDevice, NEEDS_HIP,
         device_context(device) == NULL ? INVALID_DEVICE : (*hip_device() = device, OK));
}

int hipDeviceGetAttribute(int *value, int attribute, int device) {
    CALL(hipDeviceGetAttribute, NEEDS_HIP,
         device_attribute(value, device,
                          attribute == 16   ? fake.integrated
                          : attribute == 66 ? fake.host_page_tables
                                            : -1));
}

int hipDeviceGetPCIBusId(char *id, int bytes, int device) {
    CALL(hipDeviceGetPCIBusId, NEEDS_HIP, pci_bus_id(id, bytes, device));
}

/* ---- streams and events ---- */

int hipStreamCreateWithFlags(uintptr_t *out, unsigned flags) {
    CALL(hipStreamCreateWithFlags, NEEDS_HIP, stream_create(context, false, flags, out));
}

int hipStreamDestroy(uintptr_t stream) {
    CALL(hipStreamDestroy, NEEDS_HIP, stream_destroy(context, stream));
}

int hipStreamWaitEvent(uintptr_t stream, uintptr_t event, unsigned flags) {
    CALL(hipStreamWaitEvent, NEEDS_HIP,
         flags != 0 ? INVALID_VALUE : stream_wait(context, stream, event));
}

int hipStreamSynchronize(uintptr_t stream) {
    CALL(hipStreamSynchronize, NEEDS_HIP, stream_synchronize(context, stream));
}

int hipEventCreateWithFlags(uintptr_t *out, unsigned flags) {
    (void)flags; /* some bits above the low ones exist */
    CALL(hipEventCreateWithFlags, NEEDS_HIP, event_create(context, out));
}

int hipEventDestroy(uintptr_t event) {
    CALL(hipEventDestroy, NEEDS_HIP, event_destroy(context, event));
}

int hipEventRecord(uintptr_t event, uintptr_t stream) {
    CALL(hipEventRecord, NEEDS_HIP, event_record(context, event, stream));
}

int hipEventQuery(uintptr_t event) { CALL(hipEventQuery, NEEDS_HIP, event_query(context, event)); }

int hipEventSynchronize(uintptr_t event) {
    CALL(hipEventSynchronize, NEEDS_HIP, event_synchronize(context, event));
}

/* ---- memory ---- */

int hipHostRegister(void *base, size_t bytes, unsigned flags) {
    (void)flags;
    CALL(hipHostRegister, NEEDS_HIP, host_register(base, bytes, true));
}

int hipHostUnregister(void *base) { CALL(hipHostUnregister, NEEDS_HIP, host_unregister(base)); }

int hipMemcpyHtoDAsync(uintptr_t to, const void *from, size_t bytes, uintptr_t stream) {
    CALL(hipMemcpyHtoDAsync, NEEDS_HIP, copy(context, COPY_IN, to, (uintptr_t)from, bytes, stream));
}

int hipMemcpyDtoHAsync(void *to, uintptr_t from, size_t bytes, uintptr_t stream) {
    CALL(hipMemcpyDtoHAsync, NEEDS_HIP,
         copy(context, COPY_OUT, (uintptr_t)to, from, bytes, stream));
}

int hipMemcpyDtoDAsync(uintptr_t to, uintptr_t from, size_t bytes, uintptr_t stream) {
    CALL(hipMemcpyDtoDAsync, NEEDS_HIP, copy(context, COPY_ON, to, from, bytes, stream));
}

int hipMalloc(uintptr_t *out, size_t bytes) {
    CALL(hipMalloc, NEEDS_HIP, memory_alloc(context, out, bytes));
}

int hipFree(uintptr_t address) { CALL(hipFree, NEEDS_HIP, memory_free(context, address)); }

int hipMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    CALL(hipMemGetInfo, NEEDS_HIP, memory_info(context, free_bytes, total_bytes));
}

int hipThreadExchangeStreamCaptureMode(int *mode) {
    CALL(hipThreadExchangeStreamCaptureMode, NEEDS_HIP, capture_mode_exchange(mode));
}

/* ---- errors ---- */

static const char *counted(enum function function, const char *text) {
    struct context *none = NULL;
    (void)call_begin(function, NEEDS_NOTHING, &none);
    call_end();
    return text;
}

const char *hipGetErrorName(int error) {
    static _Thread_local char name[64];
    const char *known = error_name(error);
    (void)snprintf(name, sizeof name, "hip:%s", known == NULL ? "UNRECOGNIZED" : known);
    return counted(AT_hipGetErrorName, name);
}

const char *hipGetErrorString(int error) {
    const char *known = error_string(error);
    return counted(AT_hipGetErrorString, known == NULL ? "unrecognized error code" : known);
}
