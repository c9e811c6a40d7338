/* fake_core.c - the fake driver's lock, calls, faults, contexts, handles and violations. */
#include "fake_core.h"

#include <stdarg.h>

struct fake fake = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

void *zeroed(size_t bytes) {
    void *memory = calloc(1, bytes == 0 ? 1 : bytes);
    if (memory == NULL) {
        (void)fputs("fake_cuda: no memory\n", stderr);
        abort();
    }
    return memory;
}

uint64_t random_below(uint64_t n) { /* xorshift64* */
    fake.random ^= fake.random >> 12;
    fake.random ^= fake.random << 25;
    fake.random ^= fake.random >> 27;
    return fake.random * UINT64_C(2685821657736338717) % n;
}

/* ---- violations ---- */

enum {
    TEXTS = 64,
    TEXT_BYTES = 200
};

static uint64_t violations;
static char texts[TEXTS][TEXT_BYTES];

void violation(const char *format, ...) {
    if (violations < TEXTS) {
        va_list arguments;
        va_start(arguments, format);
        (void)vsnprintf(texts[violations], TEXT_BYTES, format, arguments);
        va_end(arguments);
    }
    violations++;
}

uint64_t fake_violations(void) {
    (void)pthread_mutex_lock(&fake.lock);
    quarantine_check();
    uint64_t count = violations;
    (void)pthread_mutex_unlock(&fake.lock);
    return count;
}

const char *fake_violation_text(uint64_t i) { return i < TEXTS ? texts[i] : ""; }

/* ---- calls and faults ---- */

enum { /* CUstreamCaptureMode, hipStreamCaptureMode; 0 is "global" */
    RELAXED = 2
};

static int *capture_mode(void) {
    static _Thread_local int mode;
    return &mode;
}

int capture_mode_exchange(int *mode) {
    if (mode == NULL || *mode < 0 || *mode > RELAXED) return INVALID_VALUE;
    int before = *capture_mode();
    *capture_mode() = *mode;
    *mode = before;
    return OK;
}

void fake_capture(int on) {
    (void)pthread_mutex_lock(&fake.lock);
    fake.capturing = on != 0;
    (void)pthread_mutex_unlock(&fake.lock);
}

static const char *const names[FUNCTIONS] = {
#define FAKE_FUNCTION(result, name, arguments) #name,
#include "fake_driver.def"
#undef FAKE_FUNCTION
};

static struct {
    uint64_t calls;
    uint64_t first; /* 0: no fault */
    uint64_t count; /* 0: the device is lost */
    int code;
} functions[FUNCTIONS];

static int function_of(const char *name) {
    for (int i = 0; i < FUNCTIONS; i++)
        if (strcmp(names[i], name) == 0) return i;
    return -1;
}

static void lose_device(int code) {
    fake.lost = code;
    if (code != 0) cancel_all();
}

/* What CUDA may call "potentially unsafe": see fake_capture. */
static bool is_unordered(enum function function) {
    switch (function) {
    case AT_cuStreamCreate:
    case AT_cuStreamDestroy_v2:
    case AT_cuStreamSynchronize:
    case AT_cuEventCreate:
    case AT_cuEventDestroy_v2:
    case AT_cuEventQuery:
    case AT_cuEventSynchronize:
    case AT_cuMemHostAlloc:
    case AT_cuMemFreeHost:
    case AT_cuMemHostRegister_v2:
    case AT_cuMemHostUnregister:
    case AT_cuMemAlloc_v2:
    case AT_cuMemFree_v2:
    case AT_hipStreamCreateWithFlags:
    case AT_hipStreamDestroy:
    case AT_hipStreamSynchronize:
    case AT_hipEventCreateWithFlags:
    case AT_hipEventDestroy:
    case AT_hipEventQuery:
    case AT_hipEventSynchronize:
    case AT_hipHostRegister:
    case AT_hipHostUnregister:
    case AT_hipMalloc:
    case AT_hipFree:
    case AT_cuFileDriverOpen:
    case AT_cuFileHandleRegister:
    case AT_cuFileHandleDeregister:
    case AT_cuFileBufRegister:
    case AT_cuFileBufDeregister:
    case AT_cuFileRead:
        return true;
    default:
        return false;
    }
}

int call_begin(enum function function, enum needs needs, struct context **context) {
    (void)pthread_mutex_lock(&fake.lock);
    uint64_t call = ++functions[function].calls;
    uint64_t first = functions[function].first, count = functions[function].count;
    if (needs == NEEDS_NOTHING) return OK;
    if (fake.forked) {
        violation("%s: called in the child of a process that used the driver", names[function]);
        return NOT_INITIALIZED;
    }
    if (fake.lost == 0 && first != 0 && call >= first && count == 0)
        lose_device(functions[function].code);
    if (fake.lost != 0) return fake.lost;
    if (first != 0 && call >= first && call - first < count) return functions[function].code;
    if (fake.capturing && is_unordered(function) && *capture_mode() != RELAXED) {
        violation("%s: called while another thread captures a graph", names[function]);
        return CAPTURE_UNSUPPORTED;
    }
    if (needs == NEEDS_DRIVER) return OK;
    if (needs == NEEDS_HIP) { /* HIP initialises itself */
        if (fake.devices == 0) return NO_DEVICE;
        fake.initialised = true;
        *context = &fake.contexts[*hip_device()];
        return OK;
    }
    if (!fake.initialised) return NOT_INITIALIZED;
    if (needs == NEEDS_INIT) return OK;
    uintptr_t current = context_current();
    if (current == 0) return INVALID_CONTEXT;
    *context = &fake.contexts[current & (MAX_DEVICES - 1)];
    if ((*context)->retained > 0) return OK;
    violation("%s: the current context was released", names[function]);
    return INVALID_CONTEXT;
}

void call_end(void) { (void)pthread_mutex_unlock(&fake.lock); }

int fake_fail(const char *name, uint64_t first, uint64_t count, int code) {
    int function = function_of(name);
    if (function < 0) return -1;
    (void)pthread_mutex_lock(&fake.lock);
    functions[function].first = first;
    functions[function].count = count;
    functions[function].code = code;
    (void)pthread_mutex_unlock(&fake.lock);
    return 0;
}

void fake_refuse_pin(uint64_t first, uint64_t count) {
    (void)fake_fail("cuMemHostAlloc", first, count, OUT_OF_MEMORY);
    (void)fake_fail("cuMemHostRegister_v2", first, count, OUT_OF_MEMORY);
    (void)fake_fail("hipHostRegister", first, count, OUT_OF_MEMORY);
}

void fake_lose_device(int code) {
    (void)pthread_mutex_lock(&fake.lock);
    lose_device(code);
    (void)pthread_mutex_unlock(&fake.lock);
}

uint64_t fake_calls(const char *name) {
    int function = function_of(name);
    if (function < 0) return 0;
    (void)pthread_mutex_lock(&fake.lock);
    uint64_t calls = functions[function].calls;
    (void)pthread_mutex_unlock(&fake.lock);
    return calls;
}

/* ---- errors and devices ---- */

static const struct {
    int code;
    const char *name;
    const char *text;
} errors[] = {
    {OK, "SUCCESS", "no error"},
    {INVALID_VALUE, "INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "NO_DEVICE", "no device is detected"},
    {INVALID_DEVICE, "INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "INVALID_HANDLE", "invalid resource handle"},
    {NOT_READY, "NOT_READY", "device not ready"},
    {700, "ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {ALREADY_REGISTERED, "HOST_MEMORY_ALREADY_REGISTERED", "memory is already registered"},
    {NOT_REGISTERED, "HOST_MEMORY_NOT_REGISTERED", "memory is not registered"},
    {719, "LAUNCH_FAILED", "unspecified launch failure"},
    {CAPTURE_UNSUPPORTED, "STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {999, "UNKNOWN", "unknown error"},
};

const char *error_name(int error) {
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
        if (errors[i].code == error) return errors[i].name;
    return NULL;
}

const char *error_string(int error) {
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
        if (errors[i].code == error) return errors[i].text;
    return NULL;
}

struct context *device_context(int ordinal) {
    return ordinal >= 0 && ordinal < fake.devices ? &fake.contexts[ordinal] : NULL;
}

int pci_bus_id(char *id, int bytes, int device) {
    if (device_context(device) == NULL) return INVALID_DEVICE;
    if (id == NULL || bytes < 13) return INVALID_VALUE;
    (void)snprintf(id, (size_t)bytes, "0000:%02x:00.0", (unsigned)device + 1);
    return OK;
}

/* ---- contexts ---- */

enum {
    STACK = 64
};
/* Handles point nowhere: no address of a 64-bit process looks like this. */
#define CONTEXT_TAG ((uintptr_t)0x0fa4ec0000000000)

static unsigned epoch; /* a reset empties every thread's stack */

static _Thread_local struct {
    unsigned epoch;
    int depth;
    int hip_device;
    uintptr_t stack[STACK];
} mine;

static void mine_refresh(void) {
    if (mine.epoch == epoch) return;
    mine.epoch = epoch;
    mine.depth = mine.hip_device = 0;
}

uintptr_t context_current(void) {
    mine_refresh();
    return mine.depth == 0 ? 0 : mine.stack[mine.depth - 1];
}

int *hip_device(void) {
    mine_refresh();
    return &mine.hip_device;
}

int context_retain(int device, uintptr_t *out) {
    if (device_context(device) == NULL) return INVALID_DEVICE;
    if (out == NULL) return INVALID_VALUE;
    fake.contexts[device].retained++;
    *out = CONTEXT_TAG | (uintptr_t)device;
    return OK;
}

struct left {
    struct context *context;
    int count;
};

static void count_left(void *object, void *argument) {
    struct left *left = argument;
    if (((struct event *)object)->context == left->context) left->count++;
}

int context_release(int device) {
    struct context *context = device_context(device);
    if (context == NULL) return INVALID_DEVICE;
    if (context->retained == 0) {
        violation("context of device %d released more often than retained", device);
        return INVALID_CONTEXT;
    }
    if (--context->retained > 0) return OK;
    struct left left = {context, 0};
    handle_each(EVENT_HANDLE, count_left, &left);
    for (struct stream *stream = fake.streams; stream != NULL; stream = stream->next)
        left.count += stream->context == context && !stream->foreign && !stream->destroyed;
    if (left.count > 0)
        violation("context of device %d ends with %d streams and events", device, left.count);
    return OK;
}

int context_push(uintptr_t handle) {
    mine_refresh();
    uintptr_t ordinal = handle ^ CONTEXT_TAG;
    if (ordinal >= (uintptr_t)fake.devices || fake.contexts[ordinal].retained == 0) {
        violation("pushed %#zx, which is no context", (size_t)handle);
        return INVALID_CONTEXT;
    }
    if (mine.depth == STACK) return INVALID_VALUE;
    mine.stack[mine.depth++] = handle;
    return OK;
}

int context_pop(uintptr_t *out) {
    mine_refresh();
    if (mine.depth == 0) return INVALID_CONTEXT;
    mine.depth--;
    if (out != NULL) *out = mine.stack[mine.depth];
    return OK;
}

int fake_current_depth(void) {
    (void)pthread_mutex_lock(&fake.lock);
    mine_refresh();
    int depth = mine.depth;
    (void)pthread_mutex_unlock(&fake.lock);
    return depth;
}

/* ---- handles ---- */

#define HANDLE_TAG ((uintptr_t)0x0fa4e00000000000)
enum {
    HANDLE_STEP = 16
};

static struct handle {
    enum handle_kind kind;
    void *object; /* NULL once dropped */
} *handles;
static size_t handle_count, handle_room, handle_first; /* numbers go on after a reset */

static struct handle *handle_at(uintptr_t handle) {
    size_t i = (size_t)(handle - HANDLE_TAG) / HANDLE_STEP - handle_first;
    bool ours = handle >= HANDLE_TAG && handle % HANDLE_STEP == 0 && i < handle_count;
    return ours ? &handles[i] : NULL;
}

uintptr_t handle_add(enum handle_kind kind, void *object) {
    if (handle_count == handle_room) {
        handle_room = handle_room == 0 ? 64 : handle_room * 2;
        struct handle *grown = zeroed(handle_room * sizeof *grown);
        if (handle_count > 0) memcpy(grown, handles, handle_count * sizeof *grown);
        free(handles);
        handles = grown;
    }
    handles[handle_count] = (struct handle){kind, object};
    return HANDLE_TAG + (handle_first + handle_count++) * HANDLE_STEP;
}

void *handle_find(enum handle_kind kind, uintptr_t handle) {
    struct handle *found = handle_at(handle);
    return found != NULL && found->kind == kind ? found->object : NULL;
}

void handle_drop(uintptr_t handle) { handle_at(handle)->object = NULL; }

void handle_each(enum handle_kind kind, void (*visit)(void *object, void *argument),
                 void *argument) {
    for (size_t i = 0; i < handle_count; i++)
        if (handles[i].kind == kind && handles[i].object != NULL)
            visit(handles[i].object, argument);
}

static void handles_reset(void) {
    for (size_t i = 0; i < handle_count; i++)
        if (handles[i].kind != STREAM_HANDLE) free(handles[i].object); /* streams have a list */
    free(handles);
    handle_first += handle_count;
    handles = NULL;
    handle_count = handle_room = 0;
}

/* ---- the whole ---- */

static void forget(void) {
    violations = 0;
    memset(texts, 0, sizeof texts);
    memset(functions, 0, sizeof functions);
    fake.mode = FAKE_LATE_MODE;
    fake.query_delay = 2;
    fake.free_copies = fake.capturing = false;
    fake.integrated = fake.host_page_tables = 0;
    fake.lost = 0;
    fake.random = 1;
    fake.copied_bytes = fake.pageable_copies = 0;
    memory_defaults();
    file_defaults();
}

void fake_reset(void) {
    worker_stop();
    (void)pthread_mutex_lock(&fake.lock);
    memory_reset();
    file_reset();
    streams_reset();
    handles_reset();
    forget();
    fake.device_bytes = UINT64_C(16) << 30;
    fake.initialised = fake.forked = false;
    fake.devices = 1;
    for (int i = 0; i < MAX_DEVICES; i++) fake.contexts[i] = (struct context){.ordinal = i};
    epoch++;
    (void)pthread_mutex_unlock(&fake.lock);
}

void fake_clear(void) {
    worker_stop();
    (void)pthread_mutex_lock(&fake.lock);
    drain();
    quarantine_clear();
    forget();
    (void)pthread_mutex_unlock(&fake.lock);
}

void fake_devices(int count) {
    (void)pthread_mutex_lock(&fake.lock);
    fake.devices = count < 0 ? 0 : count > MAX_DEVICES ? MAX_DEVICES : count;
    (void)pthread_mutex_unlock(&fake.lock);
}

void fake_device_bytes(uint64_t bytes) {
    (void)pthread_mutex_lock(&fake.lock);
    fake.device_bytes = bytes;
    (void)pthread_mutex_unlock(&fake.lock);
}

void fake_query_delay(int queries) {
    (void)pthread_mutex_lock(&fake.lock);
    fake.query_delay = queries;
    (void)pthread_mutex_unlock(&fake.lock);
}

void fake_free_copies(int on) {
    (void)pthread_mutex_lock(&fake.lock);
    drain(); /* what came before is done before what follows */
    fake.free_copies = on != 0;
    (void)pthread_mutex_unlock(&fake.lock);
}

void fake_live(fake_counts *out) {
    (void)pthread_mutex_lock(&fake.lock);
    memset(out, 0, sizeof *out);
    for (int i = 0; i < MAX_DEVICES; i++) out->contexts += fake.contexts[i].retained;
    streams_count(out);
    memory_count(out);
    file_count(out);
    (void)pthread_mutex_unlock(&fake.lock);
}

/* ---- loading and forking ---- */

static void fork_prepare(void) { (void)pthread_mutex_lock(&fake.lock); }
static void fork_parent(void) { (void)pthread_mutex_unlock(&fake.lock); }
static void fork_child(void) {
    fake.forked = fake.initialised;
    fake.mode = FAKE_LATE_MODE; /* its thread is not here */
    (void)pthread_mutex_unlock(&fake.lock);
}

__attribute__((constructor)) static void loaded(void) {
    (void)pthread_atfork(fork_prepare, fork_parent, fork_child);
    fake_reset();
}

__attribute__((destructor)) static void unloaded(void) { worker_stop(); }
