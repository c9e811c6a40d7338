/* fake_cufile.c - the cuFile* functions of the fake device driver. */
#include "fake_core.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

enum { /* CUfileOpError */
    DRIVER_NOT_INITIALIZED = 5001,
    CUDA_DRIVER_ERROR = 5011,
    CUDA_POINTER_INVALID = 5012,
    CUDA_CONTEXT_MISMATCH = 5015,
    FILE_INVALID_VALUE = 5022,
    MEMORY_ALREADY_REGISTERED = 5023,
    MEMORY_NOT_REGISTERED = 5024,
    DRIVER_ALREADY_OPEN = 5026,
    HANDLE_NOT_REGISTERED = 5027,
    HANDLE_ALREADY_REGISTERED = 5028
};

enum {
    ALIGNMENT = 4096,
    BUFFERS = 64
};

struct file {
    int fd;
};

static bool driver_open, close_stdin;
static struct {
    uintptr_t base; /* 0: free */
    size_t bytes;
} buffers[BUFFERS];

/* Codes below 5000 are CUDA's. */
static fake_file_error result_of(int code) {
    fake_file_error result = {code, 0};
    if (code != OK && code < 5000) result = (fake_file_error){CUDA_DRIVER_ERROR, code};
    return result;
}

/* cuFile's functions use CUDA's current context. */
static struct context *current;

static int begin(enum function function, enum needs needs) {
    int code = call_begin(function, needs, &current);
    return code == OK && needs == NEEDS_CONTEXT && !driver_open ? DRIVER_NOT_INITIALIZED : code;
}

static fake_file_error end(int code) {
    call_end();
    return result_of(code);
}

static int check_memory(uintptr_t base, size_t bytes) {
    if (memory_live(base, bytes, current->ordinal)) return OK;
    return memory_live(base, bytes, -1) ? CUDA_CONTEXT_MISMATCH : CUDA_POINTER_INVALID;
}

/* ---- driver ---- */

fake_file_error cuFileDriverOpen(void) {
    int code = begin(AT_cuFileDriverOpen, NEEDS_DRIVER);
    if (code != OK) return end(code);
    if (driver_open) return end(DRIVER_ALREADY_OPEN);
    driver_open = true;
    if (close_stdin) (void)close(STDIN_FILENO);
    return end(OK);
}

static void count_object(void *object, void *argument) {
    (void)object;
    (*(int32_t *)argument)++;
}

static int32_t count_files(void) {
    int32_t count = 0;
    handle_each(FILE_HANDLE, count_object, &count);
    return count;
}

static int32_t count_buffers(void) {
    int32_t count = 0;
    for (int i = 0; i < BUFFERS; i++) count += buffers[i].base != 0;
    return count;
}

static int driver_close(void) {
    if (!driver_open) return DRIVER_NOT_INITIALIZED;
    if (count_files() + count_buffers() > 0)
        violation("cuFile closed with %d files and %d buffers", count_files(), count_buffers());
    driver_open = false;
    return OK;
}

fake_file_error cuFileDriverClose(void) {
    int code = begin(AT_cuFileDriverClose, NEEDS_DRIVER);
    return end(code == OK ? driver_close() : code);
}

fake_file_error cuFileDriverClose_v2(void) {
    int code = begin(AT_cuFileDriverClose_v2, NEEDS_DRIVER);
    return end(code == OK ? driver_close() : code);
}

/* ---- files ---- */

struct search {
    int fd;
    bool found;
};

static void compare_file(void *object, void *argument) {
    struct search *search = argument;
    if (((struct file *)object)->fd == search->fd) search->found = true;
}

fake_file_error cuFileHandleRegister(void **out, fake_file_descriptor *descriptor) {
    int code = begin(AT_cuFileHandleRegister, NEEDS_CONTEXT);
    if (code != OK) return end(code);
    if (out == NULL || descriptor == NULL || descriptor->type != 1 ||
        fcntl(descriptor->handle.fd, F_GETFD) < 0)
        return end(FILE_INVALID_VALUE);
    struct search search = {descriptor->handle.fd, false};
    handle_each(FILE_HANDLE, compare_file, &search);
    if (search.found) return end(HANDLE_ALREADY_REGISTERED);
    struct file *file = zeroed(sizeof *file);
    file->fd = descriptor->handle.fd;
    *out = (void *)handle_add(FILE_HANDLE, file);
    return end(OK);
}

void cuFileHandleDeregister(void *handle) {
    if (begin(AT_cuFileHandleDeregister, NEEDS_DRIVER) == OK) {
        struct file *file = handle_find(FILE_HANDLE, (uintptr_t)handle);
        if (file == NULL) {
            violation("cuFile handle %p is not registered", handle);
        } else {
            if (fcntl(file->fd, F_GETFD) < 0)
                violation("descriptor %d closed while registered with cuFile", file->fd);
            handle_drop((uintptr_t)handle);
            free(file);
        }
    }
    call_end();
}

/* ---- buffers ---- */

static int buffer_at(uintptr_t base) {
    for (int i = 0; i < BUFFERS; i++)
        if (buffers[i].base == base) return i;
    return -1;
}

bool file_buffer_within(uintptr_t base, size_t bytes) {
    for (int i = 0; i < BUFFERS; i++)
        if (buffers[i].base >= base && buffers[i].base - base < bytes) return true;
    return false;
}

fake_file_error cuFileBufRegister(const void *base, size_t bytes, int flags) {
    int code = begin(AT_cuFileBufRegister, NEEDS_CONTEXT);
    (void)flags;
    if (code != OK) return end(code);
    if (base == NULL || bytes == 0) return end(FILE_INVALID_VALUE);
    code = check_memory((uintptr_t)base, bytes);
    if (code != OK) return end(code);
    int room = buffer_at(0);
    if (buffer_at((uintptr_t)base) >= 0) return end(MEMORY_ALREADY_REGISTERED);
    if (room < 0) return end(OUT_OF_MEMORY);
    buffers[room].base = (uintptr_t)base;
    buffers[room].bytes = bytes;
    return end(OK);
}

fake_file_error cuFileBufDeregister(const void *base) {
    int code = begin(AT_cuFileBufDeregister, NEEDS_CONTEXT);
    if (code != OK) return end(code);
    int buffer = base == NULL ? -1 : buffer_at((uintptr_t)base);
    if (buffer < 0) return end(MEMORY_NOT_REGISTERED);
    buffers[buffer].base = 0;
    return end(OK);
}

/* ---- reading ---- */

static ssize_t read_file(const struct file *file, uintptr_t to, size_t bytes, off_t offset) {
    if (file == NULL) return -HANDLE_NOT_REGISTERED;
    if (offset < 0 || bytes % ALIGNMENT != 0 || offset % ALIGNMENT != 0 || to % ALIGNMENT != 0)
        return -FILE_INVALID_VALUE;
    int code = check_memory(to, bytes);
    if (code != OK) {
        violation("cuFileRead of %zu bytes at %#zx: no live block of this context", bytes,
                  (size_t)to);
        return -code;
    }
    for (size_t done = 0; done < bytes;) {
        ssize_t got = pread(file->fd, (char *)to + done, bytes - done, offset + (off_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;             /* and errno */
        if (got == 0) return (ssize_t)done; /* the file ends here */
        done += (size_t)got;
        if (done % ALIGNMENT != 0) return (ssize_t)done; /* and here, whatever O_DIRECT thinks */
    }
    return (ssize_t)bytes;
}

/* Blocks, and knows nothing of streams: work pending on the memory still comes after it. */
ssize_t cuFileRead(void *handle, void *base, size_t bytes, off_t file_offset, off_t buffer_offset) {
    int code = begin(AT_cuFileRead, NEEDS_CONTEXT);
    ssize_t result = -(ssize_t)code;
    if (code == OK) {
        result = read_file(handle_find(FILE_HANDLE, (uintptr_t)handle),
                           (uintptr_t)base + (uintptr_t)buffer_offset, bytes, file_offset);
    } else if (code == fake.lost || code == INVALID_CONTEXT || code == NOT_INITIALIZED) {
        result = -CUDA_DRIVER_ERROR;
    } else if (code < 5000) { /* a fault from the system */
        errno = code;
        result = -1;
    }
    int saved = errno;
    call_end();
    errno = saved;
    return result;
}

/* ---- the whole ---- */

void fake_close_stdin(int on) {
    (void)pthread_mutex_lock(&fake.lock);
    close_stdin = on != 0;
    (void)pthread_mutex_unlock(&fake.lock);
}

void file_defaults(void) { close_stdin = false; }

void file_reset(void) {
    driver_open = false;
    memset(buffers, 0, sizeof buffers);
}

void file_count(fake_counts *out) {
    out->file_driver = driver_open;
    out->file_handles = count_files();
    out->file_buffers = count_buffers();
}
