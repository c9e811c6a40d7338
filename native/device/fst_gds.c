/* fst_gds.c - cuFile: reads that land in device memory, in staging blocks of ours.
 *
 * cuFile wants file offset, device offset and length at multiples of 4 KiB, and buffers that
 * are registered. Tensors promise 8 bytes. So reads land in registered staging blocks, and a
 * copy on the device brings every piece to its place.
 *
 * Opening cuFile's driver takes about 2 s: only io="gds" does it, and only once. Where cuFile
 * refuses, the ring takes over, and the job's statistics say why.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>

#include "device/fst_gds.h"

#define OPAQUE_FD 1 /* CU_FILE_HANDLE_TYPE_OPAQUE_FD */

/* The ABI of cufile.h, as far as it is used. */
typedef struct file_status {
    int error;
    int driver_error;
} file_status;

typedef struct file_description {
    int type;
    union {
        int fd;
        void *handle;
    } handle;
    const void *operations;
} file_description;

static struct {
    pthread_mutex_t lock;
    bool tried;
    fst_error failure; /* of the one attempt, if it failed */
    file_status (*driver_open)(void);
    file_status (*handle_register)(void **handle, file_description *description);
    void (*handle_deregister)(void *handle);
    file_status (*buffer_register)(const void *base, size_t bytes, int flags);
    file_status (*buffer_deregister)(const void *base);
    ssize_t (*read)(void *handle, void *base, size_t bytes, off_t file_offset, off_t base_offset);
    fst_staging *spare;
} gds = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t forks_watched = PTHREAD_ONCE_INIT;

static void after_fork_child(void) {
    (void)pthread_mutex_init(&gds.lock, NULL);
    gds.spare = NULL; /* the driver's, in the parent */
}

static void watch_forks(void) { (void)pthread_atfork(NULL, NULL, after_fork_child); }

/* For the functions that others call without a registered file. */
static void lock_first(void) {
    (void)pthread_once(&forks_watched, watch_forks);
    (void)pthread_mutex_lock(&gds.lock);
}

/* Some versions close descriptor 0 when their driver opens: it is put back. */
static file_status open_driver(void) {
    int spare = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3); /* -1: there is none to lose */
    file_status status = gds.driver_open();
    if (spare >= 0) {
        if (fcntl(STDIN_FILENO, F_GETFD) < 0) (void)dup2(spare, STDIN_FILENO);
        (void)close(spare);
    }
    return status;
}

static int refused(fst_error *err, const char *what, file_status status) {
    return fst_fail(err, FST_E_INVALID, 0, "%s (%d, CUDA %d)", what, status.error,
                    status.driver_error);
}

/* With the lock held, once in a process. */
static int open_library(const fst_device *device, fst_error *err) {
    const char *given = device->gpu->library; /* a test's fake has everything in one */
    if (device->gpu->kind != FST_GPU_CUDA)
        return fst_fail(err, FST_E_INVALID, 0, "cuFile is for CUDA devices");
    void *library = dlopen(given != NULL ? given : "libcufile.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL && given == NULL) library = dlopen("libcufile.so", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return fst_fail(err, FST_E_INVALID, 0, "there is no libcufile.so.0");
    if (!fst_gpu_find(library, "cuFileDriverOpen", &gds.driver_open) ||
        !fst_gpu_find(library, "cuFileHandleRegister", &gds.handle_register) ||
        !fst_gpu_find(library, "cuFileHandleDeregister", &gds.handle_deregister) ||
        !fst_gpu_find(library, "cuFileBufRegister", &gds.buffer_register) ||
        !fst_gpu_find(library, "cuFileBufDeregister", &gds.buffer_deregister) ||
        !fst_gpu_find(library, "cuFileRead", &gds.read))
        return fst_fail(err, FST_E_INVALID, 0, "libcufile lacks a function");
    file_status status = open_driver();
    return status.error == 0 ? FST_OK : refused(err, "cuFile's driver did not open", status);
}

int fst_gds_register(fst_device *device, int fd, void **handle, fst_error *err) {
    file_description description = {.type = OPAQUE_FD, .handle = {.fd = fd}};
    fst_gpu_scope scope;
    *handle = NULL;
    int code = fst_gpu_enter(device, &scope, err);
    if (code != FST_OK) return code;
    lock_first();
    if (!gds.tried) (void)open_library(device, &gds.failure);
    gds.tried = true;
    if (gds.failure.code != FST_OK) *err = gds.failure;
    code = gds.failure.code;
    (void)pthread_mutex_unlock(&gds.lock);
    if (code == FST_OK) {
        file_status status = gds.handle_register(handle, &description);
        if (status.error != 0) code = refused(err, "cuFile refused the file", status);
    }
    fst_gpu_leave(&scope);
    return code;
}

void fst_gds_deregister(fst_device *device, void *handle) {
    fst_gpu_scope scope;
    fst_error ignored = {0};
    if (handle == NULL || fst_gpu_enter_surely(device, &scope, &ignored) != FST_OK) return;
    gds.handle_deregister(handle);
    fst_gpu_leave(&scope);
}

/* nvidia-fs moves the bytes where its module is loaded; else cuFile bounces them through host
 * memory of its own and calls that compatibility. */
const char *fst_gds_kind(void) {
    return access("/proc/driver/nvidia-fs/stats", F_OK) == 0 ? "nvidia-fs" : "compatibility mode";
}

/* ---- staging ---- */

static void destroy(fst_staging *staging) {
    fst_gpu_scope scope;
    fst_error ignored = {0};
    if (fst_gpu_enter_surely(staging->device, &scope, &ignored) == FST_OK) {
        /* What cuFile keeps is never freed: it might write to memory that is another's by then. */
        if (gds.buffer_deregister((const void *)staging->address).error == 0)
            (void)staging->device->gpu->release(staging->block);
        fst_gpu_leave(&scope);
    }
    free(staging);
}

/* With the device current. */
static int create(fst_device *device, uint64_t bytes, fst_staging **out, fst_error *err) {
    fst_staging *staging = calloc(1, sizeof *staging);
    if (staging == NULL) return fst_fail(err, FST_E_NOMEM, ENOMEM, "no memory for a staging block");
    /* The driver promises 256 bytes; cuFile wants pages. */
    int status = device->gpu->alloc(&staging->block, (size_t)(bytes + FST_DIRECT_ALIGN));
    if (status != 0) {
        free(staging);
        (void)fst_gpu_fail(err, device, "allocating a staging block", status);
        return err->code = FST_E_INVALID; /* the ring needs none */
    }
    staging->device = device;
    staging->bytes = bytes;
    staging->address = (uintptr_t)fst_align_up(staging->block, FST_DIRECT_ALIGN);
    file_status registered = gds.buffer_register((const void *)staging->address, (size_t)bytes, 0);
    if (registered.error != 0) {
        (void)device->gpu->release(staging->block);
        free(staging);
        return refused(err, "cuFile refused a buffer", registered);
    }
    *out = staging;
    return FST_OK;
}

int fst_gds_take(fst_device *device, uint64_t bytes, fst_staging **out, fst_error *err) {
    fst_staging *found = NULL;
    (void)pthread_mutex_lock(&gds.lock);
    for (fst_staging **link = &gds.spare; *link != NULL && found == NULL; link = &(*link)->next) {
        if ((*link)->device != device || (*link)->bytes < bytes) continue;
        found = *link;
        *link = found->next;
        break;
    }
    (void)pthread_mutex_unlock(&gds.lock);
    *out = found;
    if (found != NULL) return FST_OK;
    fst_gpu_scope scope;
    int code = fst_gpu_enter(device, &scope, err);
    if (code != FST_OK) return code;
    code = create(device, bytes, out, err);
    fst_gpu_leave(&scope);
    return code;
}

void fst_gds_give(fst_staging *staging) {
    if (staging == NULL) return;
    (void)pthread_mutex_lock(&gds.lock);
    staging->next = gds.spare;
    gds.spare = staging;
    (void)pthread_mutex_unlock(&gds.lock);
}

void fst_gds_clear(void) {
    for (;;) {
        lock_first();
        fst_staging *staging = gds.spare;
        if (staging != NULL) gds.spare = staging->next;
        (void)pthread_mutex_unlock(&gds.lock);
        if (staging == NULL) return;
        destroy(staging);
    }
}

/* ---- reading ---- */

int fst_gds_read(const fst_io_context *io, void *handle, const fst_staging *staging,
                 fst_error *err) {
    uint64_t from = fst_align_down(io->begin, FST_DIRECT_ALIGN);
    uint64_t need = io->end - from, want = fst_align_up(need, FST_DIRECT_ALIGN), got = 0;
    fst_gpu_scope scope;
    if (want > staging->bytes)
        return fst_fail(err, FST_E_INVALID, EINVAL, "%s: chunk larger than its staging block",
                        io->file->path);
    int code = fst_gpu_enter(staging->device, &scope, err);
    if (code != FST_OK) return code;
    while (code == FST_OK && got < need) {
        code = fst_io_check_stop(io, err);
        if (code != FST_OK) break;
        ssize_t n = gds.read(handle, (void *)staging->address, (size_t)(want - got),
                             (off_t)(from + got), (off_t)got);
        if (n < 0) {
            if (n == -1 && errno == EINTR) continue;
            code = fst_fail(err, FST_E_INVALID, n == -1 ? errno : 0,
                            "cuFile could not read (%lld, errno %d)", (long long)n,
                            n == -1 ? errno : 0);
        } else if (n == 0) {
            code = fst_file_truncated(io->file, from + got, err);
        } else if (got + (uint64_t)n < need && (uint64_t)n < FST_DIRECT_ALIGN) {
            code = fst_fail(err, FST_E_INVALID, 0, "cuFile reads less than a block at a time");
        } else {
            got += (uint64_t)n;
            if (got < need) got = fst_align_down(got, FST_DIRECT_ALIGN);
        }
    }
    fst_gpu_leave(&scope);
    return code == FST_OK ? fst_file_check_end(io->file, io->end, err) : code;
}
