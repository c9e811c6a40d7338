/* fake_core.h - what the fake driver's parts share. Everything here runs under fake.lock. */
#ifndef FAKE_CORE_H
#define FAKE_CORE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda.h"

enum { /* CUDA's codes; HIP's are the same */
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    CAPTURE_UNSUPPORTED = 900
};

enum {
    MAX_DEVICES = 16
};

struct context {
    int ordinal;
    int retained;
    struct stream *null_stream; /* made when first used */
};

struct stream {
    struct stream *next; /* older */
    struct context *context;
    bool foreign; /* the allocator's */
    bool destroyed;
    struct op *head; /* runs next */
    struct op *tail;
};

enum kind {
    NOTHING_TO_DO, /* what a cancelled operation becomes */
    COPY_IN,
    COPY_OUT,
    COPY_ON,
    COPY_STRIDED, /* torch's own */
    FILL,
    RECORD,
    WAIT
};

struct op {
    struct op *next;
    struct stream *stream;
    enum kind kind;
    bool done;
    int references; /* by its stream, its event and those who wait for it */
    int queries;
    uintptr_t to;
    uintptr_t from;
    size_t bytes;
    size_t from_bytes;       /* COPY_STRIDED: from the first element read to the last */
    struct strided *strided; /* COPY_STRIDED: which elements; freed with the operation */
    struct op *record;       /* WAIT: what for */
};

struct event {
    struct context *context;
    struct op *record; /* the last one, or NULL */
};

enum function {
#define FAKE_FUNCTION(result, name, arguments) AT_##name,
#include "fake_driver.def"
#undef FAKE_FUNCTION
    FUNCTIONS
};

extern struct fake {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* something ran, or can run */
    int mode;
    int devices;
    int query_delay;
    bool free_copies;
    int integrated; /* the answers of every device to questions for these attributes */
    int host_page_tables;
    bool initialised;
    bool forked;    /* since then: nothing works any more */
    bool capturing; /* a thread that is none of the callers captures a graph, in "global" mode */
    int lost;       /* code, or 0 */
    uint64_t device_bytes;
    uint64_t random;
    uint64_t pending;
    uint64_t copied_bytes;
    uint64_t pageable_copies;
    struct context contexts[MAX_DEVICES];
    struct stream *streams; /* newest first; destroyed ones stay until reset */
} fake;

/* ---- calls (fake_core.c) ---- */

enum needs {
    NEEDS_NOTHING, /* not even a device */
    NEEDS_DRIVER,
    NEEDS_INIT,
    NEEDS_CONTEXT,
    NEEDS_HIP /* its context is that of the thread's device */
};

/* Takes the lock, counts the call and says whether it may go on. */
int call_begin(enum function function, enum needs needs, struct context **context);
void call_end(void);

/* The body of an exported function; the expression can use context. */
#define CALL(name, needs, expression)                                                              \
    do {                                                                                           \
        struct context *context = NULL;                                                            \
        int call_code = call_begin(AT_##name, (needs), &context);                                  \
        (void)context;                                                                             \
        if (call_code == OK) call_code = (expression);                                             \
        call_end();                                                                                \
        return call_code;                                                                          \
    } while (0)

void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
void *zeroed(size_t bytes); /* ends the process when there is no memory */
uint64_t random_below(uint64_t n);
struct context *device_context(int ordinal); /* NULL: no such device */
const char *error_name(int error);
const char *error_string(int error);
int pci_bus_id(char *id, int bytes, int device);

/* The calling thread's contexts. */
int context_retain(int device, uintptr_t *out);
int context_release(int device);
int context_push(uintptr_t handle);
int context_pop(uintptr_t *out);
uintptr_t context_current(void);
int *hip_device(void);
int capture_mode_exchange(int *mode);

/* Handles are numbers that were never given out before and point nowhere. */
enum handle_kind {
    STREAM_HANDLE = 1,
    EVENT_HANDLE,
    FILE_HANDLE
};
uintptr_t handle_add(enum handle_kind kind, void *object);
void *handle_find(enum handle_kind kind, uintptr_t handle); /* NULL: not such a one */
void handle_drop(uintptr_t handle);
/* Calls visit for every live object of a kind. */
void handle_each(enum handle_kind kind, void (*visit)(void *object, void *argument),
                 void *argument);

/* ---- streams and events (fake_stream.c) ---- */

int stream_create(struct context *context, bool foreign, unsigned flags, uintptr_t *out);
int stream_destroy(struct context *context, uintptr_t handle);
int stream_synchronize(struct context *context, uintptr_t handle);
int stream_wait(struct context *context, uintptr_t handle, uintptr_t event);
struct stream *stream_find(struct context *context, uintptr_t handle); /* NULL: violation */
int event_create(struct context *context, uintptr_t *out);
int event_destroy(struct context *context, uintptr_t handle);
int event_record(struct context *context, uintptr_t handle, uintptr_t stream);
int event_query(struct context *context, uintptr_t handle);
int event_synchronize(struct context *context, uintptr_t handle);

struct op *op_submit(struct stream *stream, enum kind kind); /* with one reference */
void op_release(struct op *op);
void op_force(struct op *op); /* runs it and all it depends on, and no more */
/* The next pending operation after a given one (NULL: the first) that touches memory. */
struct op *op_touching(struct op *after, uintptr_t base, size_t bytes);
bool op_reads(const struct op *op, uintptr_t base, size_t bytes);
void drain(void);
void cancel_all(void);
void worker_start(void);
void worker_stop(void); /* without the lock */
void streams_reset(void);
void streams_count(fake_counts *out);

/* ---- memory (fake_memory.c) ---- */

enum block_state {
    LIVE,
    AWAITED,     /* freed, but streams that were recorded on it are not done with it */
    QUARANTINED, /* freed: nobody may write there any more */
    ORPHAN       /* dropped by a reset, its DLPack struct not yet deleted */
};

struct block {
    struct block *next; /* older */
    uintptr_t base;
    size_t bytes;
    size_t capacity;
    void *memory; /* what to free, or NULL: the caller's */
    struct context *context;
    struct stream *stream; /* it was allocated on, or NULL: cuMemAlloc */
    enum block_state state;
    bool managed;         /* a DLPack struct exists */
    bool unfilled;        /* copies were free when it was freed, or are still to read it */
    struct usage *usages; /* of other streams that were recorded on it */
};

struct usage {
    struct usage *next;
    struct stream *stream;
    struct op *record; /* what was pending when the block was freed, or NULL: it is not */
};

struct block *block_holding(uintptr_t base, size_t bytes); /* a live one, or NULL */
struct block *block_starting(uintptr_t base);
struct block *block_alloc(struct context *context, size_t bytes, bool pages);
struct block *block_reuse(size_t bytes, const struct stream *stream);
void block_push(struct block *block);
void block_live(struct block *block);
void block_free(struct block *block);
void block_forget(struct block *block); /* of the caller's memory */
void block_end(struct block *block);
void blocks_awaited(void); /* those whose streams are done are free */
int blocks_dlpack_type(void);
bool quarantine_is_full(void); /* then blocks are handed out again */

int memory_alloc(struct context *context, uintptr_t *out, size_t bytes);
int memory_free(struct context *context, uintptr_t address);
int memory_info(struct context *context, size_t *free_bytes, size_t *total_bytes);
int device_attribute(int *value, int device, int answer); /* answer below 0: it is not known */
int host_alloc(void **out, size_t bytes);
int host_free(void *base);
int host_register(void *base, size_t bytes, bool pins);
int host_unregister(void *base);
int copy(struct context *context, enum kind kind, uintptr_t to, uintptr_t from, size_t bytes,
         uintptr_t stream);
/* Whether a range lies in one live block, of this device unless that is -1. */
bool memory_live(uintptr_t base, size_t bytes, int device);
void op_run(struct op *op);               /* copies and fills */
void op_run_strided(const struct op *op); /* fake_torch.c */
void quarantine_check(void);
void quarantine_clear(void);
void memory_defaults(void);
void memory_reset(void);
void memory_count(fake_counts *out);

/* ---- cuFile (fake_cufile.c) ---- */

bool file_buffer_within(uintptr_t base, size_t bytes);
void file_defaults(void);
void file_reset(void);
void file_count(fake_counts *out);

#endif
