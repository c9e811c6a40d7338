/* fst_gpu.c - driver libraries opened at run time, and devices in their primary contexts. */
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fst_sys.h"
#include "device/fst_gpu.h"

#define NON_BLOCKING 1u  /* CU_STREAM_NON_BLOCKING, hipStreamNonBlocking */
#define EVENT_FLAGS 0x3u /* blocking wait, no timing; the same numbers in HIP */
#define RELAXED 2        /* CU_STREAM_CAPTURE_MODE_RELAXED, hipStreamCaptureModeRelaxed */

/* Kept until the process ends: other libraries may hold the same contexts. */
static pthread_mutex_t registry = PTHREAD_MUTEX_INITIALIZER;
static fst_gpu *gpus;
static fst_device *devices;
static atomic_bool forked; /* with a driver initialised: it cannot be used in this process */
static pthread_once_t forks_watched = PTHREAD_ONCE_INIT;

/* Versioned names first: the plain ones belong to development packages. If torch has loaded a
 * library of the same name, dlopen returns that one. */
static const char *const usual_names[2][6] = {
    {"libcuda.so.1", "libcuda.so", NULL},
    {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so", NULL},
};

static void *open_library(int kind, const char *library, fst_error *err) {
    void *found = NULL;
    if (library != NULL) {
        found = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    } else {
        for (int pass = 0; pass < 2; pass++)
            for (int i = 0; usual_names[kind][i] != NULL && found == NULL; i++)
                found = dlopen(usual_names[kind][i],
                               RTLD_NOW | RTLD_LOCAL | (pass == 0 ? RTLD_NOLOAD : 0));
    }
    if (found == NULL) {
        const char *why = dlerror();
        (void)fst_fail(err, FST_E_DEVICE, 0, "no driver library: %s",
                       why == NULL ? "unknown reason" : why);
    }
    return found;
}

/* dlsym gives an object pointer; POSIX promises that it holds a function's address. */
bool fst_gpu_find(void *library, const char *name, void *field) {
    void *address = dlsym(library, name);
    memcpy(field, &address, sizeof address);
    return address != NULL;
}

static bool find_all(fst_gpu *gpu, void *library, fst_error *err) {
#define FST_GPU_SYMBOL(field, cuda, hip, arguments)                                                \
    {                                                                                              \
        const char *const names[2] = {cuda, hip};                                                  \
        if (names[gpu->kind] != NULL && !fst_gpu_find(library, names[gpu->kind], &gpu->field)) {   \
            (void)fst_fail(err, FST_E_DEVICE, 0, "the driver library has no %s",                   \
                           names[gpu->kind]);                                                      \
            return false;                                                                          \
        }                                                                                          \
    }
#include "device/fst_gpu.def"
#undef FST_GPU_SYMBOL
    (void)fst_gpu_find(library,
                       gpu->kind == FST_GPU_CUDA ? "cuThreadExchangeStreamCaptureMode"
                                                 : "hipThreadExchangeStreamCaptureMode",
                       &gpu->exchange_capture_mode);
    /* For messages only. */
    if (gpu->kind == FST_GPU_CUDA)
        (void)fst_gpu_find(library, "cuGetErrorName", &gpu->cuda_error_name);
    else
        (void)fst_gpu_find(library, "hipGetErrorName", &gpu->hip_error_name);
    return true;
}

static const char *status_name(const fst_gpu *gpu, int status) {
    const char *name = NULL;
    if (gpu->cuda_error_name != NULL && gpu->cuda_error_name(status, &name) != 0) name = NULL;
    if (gpu->hip_error_name != NULL) name = gpu->hip_error_name(status);
    return name == NULL ? "unknown error" : name;
}

int fst_gpu_fail(fst_error *err, const fst_device *device, const char *call, int status) {
    const fst_gpu *gpu = device->gpu;
    return fst_fail(err, FST_E_DEVICE, 0, "%s:%d: %s: %s (%d)",
                    gpu->kind == FST_GPU_CUDA ? "cuda" : "hip", device->ordinal, call,
                    status_name(gpu, status), status);
}

static bool same_library(const fst_gpu *gpu, int kind, const char *library) {
    if (gpu->kind != kind || (gpu->library == NULL) != (library == NULL)) return false;
    return library == NULL || strcmp(gpu->library, library) == 0;
}

/* With the registry locked. */
static fst_gpu *open_gpu(int kind, const char *library, fst_error *err) {
    for (fst_gpu *gpu = gpus; gpu != NULL; gpu = gpu->next)
        if (same_library(gpu, kind, library)) return gpu;
    fst_gpu *gpu = calloc(1, sizeof *gpu);
    char *copy = library == NULL ? NULL : strdup(library);
    if (gpu == NULL || (library != NULL && copy == NULL)) {
        (void)fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory for a driver's record");
        goto failed;
    }
    gpu->kind = kind;
    gpu->library = copy;
    void *handle = open_library(kind, library, err);
    if (handle == NULL) goto failed;
    /* From here on the library stays loaded: it may have started threads. */
    if (!find_all(gpu, handle, err)) goto failed;
    int status = gpu->init(0);
    if (status != 0) {
        (void)fst_fail(err, FST_E_DEVICE, 0, "%s: %s (%d)",
                       kind == FST_GPU_CUDA ? "cuInit" : "hipInit", status_name(gpu, status),
                       status);
        goto failed;
    }
    gpu->next = gpus;
    gpus = gpu;
    return gpu;
failed:
    free(copy);
    free(gpu);
    return NULL;
}

/* The node whose memory is nearest to the device, or -1. */
static int numa_node(const fst_gpu *gpu, int device) {
    char id[32] = "";
    long long node;
    if (gpu->bus_id(id, (int)sizeof id, device) != 0) return -1;
    for (char *c = id; *c != '\0'; c++) *c = (char)tolower((unsigned char)*c);
    return fst_read_number(&node, "/sys/bus/pci/devices/%s/numa_node", id) ? (int)node : -1;
}

bool fst_gpu_memory_is(const fst_device *device, enum fst_gpu_memory what) {
    /* CU_DEVICE_ATTRIBUTE_INTEGRATED, _PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES; HIP's
     * hipDeviceAttributeIntegrated and so on, as numbered since ROCm 5 */
    static const int numbers[2][2] = {{18, 100}, {16, 66}};
    const fst_gpu *gpu = device->gpu;
    int value = 0;
    return gpu->attribute(&value, numbers[gpu->kind][what], device->handle) == 0 && value == 1;
}

static int make_current(const fst_device *device, fst_gpu_scope *scope, fst_error *err) {
    const fst_gpu *gpu = device->gpu;
    if (atomic_load(&forked))
        return fst_fail(err, FST_E_DEVICE, 0, "%s:%d: the process forked after the driver started",
                        gpu->kind == FST_GPU_CUDA ? "cuda" : "hip", device->ordinal);
    if (gpu->kind == FST_GPU_CUDA) {
        int status = gpu->context_push(device->context);
        return status == 0 ? FST_OK : fst_gpu_fail(err, device, "cuCtxPushCurrent", status);
    }
    int status = gpu->current_device(&scope->before);
    if (status != 0) return fst_gpu_fail(err, device, "hipGetDevice", status);
    status = gpu->use_device(device->ordinal);
    return status == 0 ? FST_OK : fst_gpu_fail(err, device, "hipSetDevice", status);
}

int fst_gpu_enter(const fst_device *device, fst_gpu_scope *scope, fst_error *err) {
    const fst_gpu *gpu = device->gpu;
    *scope = (fst_gpu_scope){.device = device, .capture_mode = RELAXED};
    int code = make_current(device, scope, err);
    if (code == FST_OK && FST_KEEPS(FST_RULE_CAPTURE) && gpu->exchange_capture_mode != NULL)
        scope->relaxed = gpu->exchange_capture_mode(&scope->capture_mode) == 0;
    return code;
}

int fst_gpu_enter_surely(const fst_device *device, fst_gpu_scope *scope, fst_error *err) {
    int code = fst_gpu_enter(device, scope, err);
    return code == FST_OK ? code : fst_gpu_enter(device, scope, err);
}

void fst_gpu_leave(const fst_gpu_scope *scope) {
    const fst_gpu *gpu = scope->device->gpu;
    void *popped;
    int capture_mode = scope->capture_mode;
    if (scope->relaxed) (void)gpu->exchange_capture_mode(&capture_mode);
    if (gpu->kind == FST_GPU_CUDA)
        (void)gpu->context_pop(&popped);
    else
        (void)gpu->use_device(scope->before);
}

/* ---- events ---- */

void *fst_gpu_take_event(fst_device *device, fst_error *err) {
    void *event = NULL;
    (void)pthread_mutex_lock(&device->lock);
    if (device->events_count > 0) event = device->events[--device->events_count];
    (void)pthread_mutex_unlock(&device->lock);
    if (event != NULL) return event;
    int status = device->gpu->event_create(&event, EVENT_FLAGS);
    if (status == 0) return event;
    (void)fst_gpu_fail(err, device, "creating an event", status);
    return NULL;
}

/* Without room for it an event is lost until the process ends; it is a few bytes. */
void fst_gpu_give_event(fst_device *device, void *event) {
    if (event == NULL) return;
    (void)pthread_mutex_lock(&device->lock);
    if (device->events_count == device->events_room) {
        uint64_t room = device->events_room * 2 + 64;
        void **more = realloc(device->events, (size_t)room * sizeof *more);
        if (more != NULL) {
            device->events = more;
            device->events_room = room;
        }
    }
    if (device->events_count < device->events_room) device->events[device->events_count++] = event;
    (void)pthread_mutex_unlock(&device->lock);
}

/* ---- devices ---- */

static int start_streams(fst_device *device, fst_error *err) {
    const fst_gpu *gpu = device->gpu;
    fst_gpu_scope scope;
    int started = 0, code = fst_gpu_enter(device, &scope, err);
    if (code != FST_OK) return code;
    for (; started < FST_STREAMS && code == FST_OK; started++) {
        int status = gpu->stream_create(&device->streams[started], NON_BLOCKING);
        if (status != 0) code = fst_gpu_fail(err, device, "creating a stream", status);
    }
    /* The last one counted is the one that failed. */
    for (int i = 0; code != FST_OK && i < started - 1; i++)
        (void)gpu->stream_destroy(device->streams[i]);
    fst_gpu_leave(&scope);
    return code;
}

static int retain_context(fst_device *device, fst_error *err) {
    const fst_gpu *gpu = device->gpu;
    if (gpu->kind != FST_GPU_CUDA) return FST_OK;
    int status = gpu->device_get(&device->handle, device->ordinal);
    if (status == 0) status = gpu->context_retain(&device->context, device->handle);
    return status == 0 ? FST_OK
                       : fst_gpu_fail(err, device, "retaining its primary context", status);
}

/* With the registry locked. */
static int new_device(const fst_gpu *gpu, int ordinal, fst_device **out, fst_error *err) {
    int count = 0, status = gpu->device_count(&count);
    fst_device probe = {.gpu = gpu, .ordinal = ordinal, .handle = ordinal};
    if (status != 0) return fst_gpu_fail(err, &probe, "counting devices", status);
    if (ordinal < 0 || ordinal >= count)
        return fst_fail(err, FST_E_DEVICE, 0, "there is no device %d: the driver has %d", ordinal,
                        count);
    fst_device *device = calloc(1, sizeof *device);
    if (device == NULL)
        return fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory for a device's record");
    int code = retain_context(&probe, err);
    if (code == FST_OK) {
        code = start_streams(&probe, err);
        if (code != FST_OK && gpu->kind == FST_GPU_CUDA) (void)gpu->context_release(probe.handle);
    }
    if (code != FST_OK) {
        free(device);
        return code;
    }
    *device = probe;
    device->numa_node = numa_node(gpu, device->handle);
    (void)pthread_mutex_init(&device->lock, NULL);
    *out = device;
    return FST_OK;
}

static void after_fork_child(void) {
    if (gpus != NULL) atomic_store(&forked, true);
    (void)pthread_mutex_init(&registry, NULL); /* another thread may have held it */
}

static void watch_forks(void) { (void)pthread_atfork(NULL, NULL, after_fork_child); }

int fst_device_open(int kind, const char *library, int ordinal, fst_device **out, fst_error *err) {
    *out = NULL;
    if (kind != FST_GPU_CUDA && kind != FST_GPU_HIP)
        return fst_fail(err, FST_E_INVALID, EINVAL, "there is no kind %d of device", kind);
    if (atomic_load(&forked))
        return fst_fail(err, FST_E_DEVICE, 0, "the process forked after the driver started");
    (void)pthread_once(&forks_watched, watch_forks);
    (void)pthread_mutex_lock(&registry);
    fst_gpu *gpu = open_gpu(kind, library, err);
    int code = gpu == NULL ? err->code : FST_OK;
    fst_device *device = devices;
    while (device != NULL && (device->gpu != gpu || device->ordinal != ordinal))
        device = device->next;
    if (gpu != NULL && device == NULL) {
        code = new_device(gpu, ordinal, &device, err);
        if (code == FST_OK) {
            device->next = devices;
            devices = device;
        }
    }
    (void)pthread_mutex_unlock(&registry);
    if (code == FST_OK) *out = device;
    return code;
}

int fst_device_get_info(fst_device *device, fst_device_info *info, fst_error *err) {
    size_t free_bytes = 0, total = 0;
    fst_gpu_scope scope;
    int code = fst_gpu_enter(device, &scope, err);
    if (code != FST_OK) return code;
    int status = device->gpu->memory_info(&free_bytes, &total);
    bool integrated = fst_gpu_memory_is(device, FST_GPU_INTEGRATED);
    bool host_page_tables = fst_gpu_memory_is(device, FST_GPU_HOST_PAGE_TABLES);
    fst_gpu_leave(&scope);
    *info = (fst_device_info){.kind = device->gpu->kind,
                              .ordinal = device->ordinal,
                              .streams = FST_STREAMS,
                              .numa_node = device->numa_node,
                              .integrated = integrated,
                              .host_page_tables = host_page_tables,
                              .free_bytes = free_bytes,
                              .total_bytes = total};
    return status == 0 ? FST_OK : fst_gpu_fail(err, device, "asking for its free memory", status);
}
