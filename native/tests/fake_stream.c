/* fake_stream.c - the fake driver's streams and events, and who runs what is pending. */
#include "fake_core.h"

#include <errno.h>
#include <time.h>

/* ---- operations ---- */

void op_release(struct op *op) {
    if (op == NULL || --op->references > 0) return;
    free(op->strided);
    free(op);
}

struct op *op_submit(struct stream *stream, enum kind kind) {
    struct op *op = zeroed(sizeof *op);
    op->stream = stream;
    op->kind = kind;
    op->references = 1;
    if (stream->head == NULL)
        stream->head = op;
    else
        stream->tail->next = op;
    stream->tail = op;
    fake.pending++;
    (void)pthread_cond_broadcast(&fake.changed);
    return op;
}

/* Takes the first operation off its stream: it is done, run or not. */
static void head_done(struct stream *stream) {
    struct op *op = stream->head;
    stream->head = op->next;
    if (op->kind == WAIT) op_release(op->record);
    op->done = true;
    fake.pending--;
    op_release(op);
    (void)pthread_cond_broadcast(&fake.changed);
}

static void run_head(struct stream *stream) {
    /* What a wait is for was recorded before: this comes to an end. */
    struct op *op = stream->head;
    while (op->kind == WAIT && !op->record->done) run_head(op->record->stream);
    op_run(op);
    head_done(stream);
}

void op_force(struct op *op) {
    op->references++;
    while (!op->done) run_head(op->stream);
    op_release(op);
}

/* The host waits. In random mode the real API gives others time to do harm meanwhile. */
static void op_wait(struct op *op) {
    op->references++;
    for (uint64_t i = fake.mode == FAKE_RANDOM_MODE ? random_below(4) : 0; i > 0 && !op->done;
         i--) {
        struct timespec until;
        (void)clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 200000;
        if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
        (void)pthread_cond_timedwait(&fake.changed, &fake.lock, &until);
    }
    while (!op->done) run_head(op->stream);
    op_release(op);
}

struct op *op_touching(struct op *after, uintptr_t base, size_t bytes) {
    struct stream *stream = after == NULL ? fake.streams : after->stream;
    struct op *op = after == NULL ? NULL : after->next;
    if (after == NULL && stream != NULL) op = stream->head;
    while (stream != NULL) {
        for (; op != NULL; op = op->next) {
            bool copies = op->kind >= COPY_IN && op->kind <= COPY_STRIDED;
            bool writes = copies || op->kind == FILL;
            if (writes && op->to < base + bytes && base < op->to + op->bytes) return op;
            if (copies && op_reads(op, base, bytes)) return op;
        }
        stream = stream->next;
        if (stream != NULL) op = stream->head;
    }
    return NULL;
}

bool op_reads(const struct op *op, uintptr_t base, size_t bytes) {
    size_t from_bytes = op->kind == COPY_STRIDED ? op->from_bytes : op->bytes;
    return op->from != 0 && op->from < base + bytes && base < op->from + from_bytes;
}

void cancel_all(void) {
    for (struct stream *stream = fake.streams; stream != NULL; stream = stream->next)
        while (stream->head != NULL) head_done(stream);
}

/* Newest streams first, the allocator's last: its fills hit whoever did not wait for them. */
void drain(void) {
    for (int foreign = 0; foreign < 2; foreign++)
        for (struct stream *stream = fake.streams; stream != NULL; stream = stream->next)
            while (stream->foreign == (foreign != 0) && stream->head != NULL) run_head(stream);
}

void fake_drain(void) {
    (void)pthread_mutex_lock(&fake.lock);
    drain();
    (void)pthread_mutex_unlock(&fake.lock);
}

uint64_t fake_pending(void) {
    (void)pthread_mutex_lock(&fake.lock);
    uint64_t pending = fake.pending;
    (void)pthread_mutex_unlock(&fake.lock);
    return pending;
}

/* ---- the thread of random mode ---- */

static pthread_t worker;
static bool worker_exists;

static bool can_run(const struct stream *stream) {
    return stream->head != NULL && (stream->head->kind != WAIT || stream->head->record->done);
}

static struct stream *random_stream(void) {
    uint64_t count = 0;
    for (struct stream *stream = fake.streams; stream != NULL; stream = stream->next)
        count += can_run(stream);
    if (count == 0) return NULL;
    uint64_t skip = random_below(count);
    for (struct stream *stream = fake.streams;; stream = stream->next)
        if (can_run(stream) && skip-- == 0) return stream;
}

static void *work(void *unused) {
    (void)unused;
    (void)pthread_mutex_lock(&fake.lock);
    while (fake.mode == FAKE_RANDOM_MODE) {
        struct stream *stream = random_stream();
        if (stream == NULL) {
            (void)pthread_cond_wait(&fake.changed, &fake.lock);
            continue;
        }
        run_head(stream);
        struct timespec pause = {0, (long)random_below(random_below(32) == 0 ? 1000000 : 50000)};
        (void)pthread_mutex_unlock(&fake.lock);
        (void)nanosleep(&pause, NULL);
        (void)pthread_mutex_lock(&fake.lock);
    }
    (void)pthread_mutex_unlock(&fake.lock);
    return NULL;
}

void worker_start(void) {
    fake.mode = FAKE_RANDOM_MODE;
    worker_exists = pthread_create(&worker, NULL, work, NULL) == 0;
    if (!worker_exists) fake.mode = FAKE_LATE_MODE;
}

void worker_stop(void) {
    (void)pthread_mutex_lock(&fake.lock);
    bool running = worker_exists && fake.mode == FAKE_RANDOM_MODE; /* not in a forked child */
    fake.mode = FAKE_LATE_MODE;
    worker_exists = false;
    (void)pthread_cond_broadcast(&fake.changed);
    (void)pthread_mutex_unlock(&fake.lock);
    if (running) (void)pthread_join(worker, NULL);
}

void fake_mode(int mode, uint64_t seed) {
    worker_stop();
    (void)pthread_mutex_lock(&fake.lock);
    fake.random = seed * 2 + 1; /* never 0 */
    if (mode == FAKE_RANDOM_MODE) worker_start();
    (void)pthread_mutex_unlock(&fake.lock);
}

/* ---- streams ---- */

static struct stream *stream_add(struct context *context, bool foreign) {
    struct stream *stream = zeroed(sizeof *stream);
    stream->context = context;
    stream->foreign = foreign;
    stream->next = fake.streams;
    fake.streams = stream;
    return stream;
}

int stream_create(struct context *context, bool foreign, unsigned flags, uintptr_t *out) {
    if (out == NULL || flags > 1) return INVALID_VALUE;
    if (flags != 1) violation("stream without the non-blocking flag"); /* waits for stream 0 */
    *out = handle_add(STREAM_HANDLE, stream_add(context, foreign));
    return OK;
}

struct stream *stream_find(struct context *context, uintptr_t handle) {
    if (handle <= 1) { /* 1 is CU_STREAM_LEGACY */
        if (context->null_stream == NULL) context->null_stream = stream_add(context, true);
        return context->null_stream;
    }
    struct stream *stream = handle_find(STREAM_HANDLE, handle);
    if (stream != NULL && stream->context == context) return stream;
    violation("%#zx is no stream of the context of device %d", (size_t)handle, context->ordinal);
    return NULL;
}

/* Its work goes on. */
int stream_destroy(struct context *context, uintptr_t handle) {
    struct stream *stream = stream_find(context, handle);
    if (stream == NULL || handle <= 1) return INVALID_HANDLE;
    stream->destroyed = true;
    handle_drop(handle);
    return OK;
}

int stream_synchronize(struct context *context, uintptr_t handle) {
    struct stream *stream = stream_find(context, handle);
    if (stream == NULL) return INVALID_HANDLE;
    if (stream->head != NULL) op_wait(stream->tail);
    return fake.lost;
}

uintptr_t fake_stream(int device) {
    uintptr_t handle = 0;
    (void)pthread_mutex_lock(&fake.lock);
    struct context *context = device_context(device);
    if (context != NULL) (void)stream_create(context, true, 1, &handle);
    (void)pthread_mutex_unlock(&fake.lock);
    return handle;
}

/* ---- events ---- */

int event_create(struct context *context, uintptr_t *out) {
    if (out == NULL) return INVALID_VALUE;
    struct event *event = zeroed(sizeof *event);
    event->context = context;
    *out = handle_add(EVENT_HANDLE, event);
    return OK;
}

static struct event *event_find(struct context *context, uintptr_t handle) {
    struct event *event = handle_find(EVENT_HANDLE, handle);
    if (event != NULL && event->context == context) return event;
    violation("%#zx is no event of the context of device %d", (size_t)handle, context->ordinal);
    return NULL;
}

int event_destroy(struct context *context, uintptr_t handle) {
    struct event *event = event_find(context, handle);
    if (event == NULL) return INVALID_HANDLE;
    op_release(event->record);
    free(event);
    handle_drop(handle);
    return OK;
}

int event_record(struct context *context, uintptr_t handle, uintptr_t stream_handle) {
    struct event *event = event_find(context, handle);
    struct stream *stream = stream_find(context, stream_handle);
    if (event == NULL || stream == NULL) return INVALID_HANDLE;
    op_release(event->record);
    event->record = NULL;
    if (fake.free_copies) return OK; /* all before it is done */
    event->record = op_submit(stream, RECORD);
    event->record->references++;
    return OK;
}

/* For the record current now, whatever is recorded later. */
int stream_wait(struct context *context, uintptr_t handle, uintptr_t event_handle) {
    struct stream *stream = stream_find(context, handle);
    struct event *event = event_find(context, event_handle);
    if (event == NULL || stream == NULL) return INVALID_HANDLE;
    if (event->record == NULL || event->record->done) return OK;
    struct op *op = op_submit(stream, WAIT);
    op->record = event->record;
    op->record->references++;
    return OK;
}

int event_query(struct context *context, uintptr_t handle) {
    struct event *event = event_find(context, handle);
    if (event == NULL) return INVALID_HANDLE;
    if (event->record == NULL || event->record->done) return OK;
    if (event->record->queries++ < fake.query_delay) return NOT_READY;
    op_force(event->record);
    return OK;
}

int event_synchronize(struct context *context, uintptr_t handle) {
    struct event *event = event_find(context, handle);
    if (event == NULL) return INVALID_HANDLE;
    if (event->record != NULL) op_wait(event->record);
    return fake.lost;
}

/* ---- the whole ---- */

static void event_end(void *object, void *unused) {
    struct event *event = object;
    (void)unused;
    op_release(event->record);
    event->record = NULL;
}

void streams_reset(void) {
    cancel_all();
    handle_each(EVENT_HANDLE, event_end, NULL);
    while (fake.streams != NULL) {
        struct stream *stream = fake.streams;
        fake.streams = stream->next;
        free(stream);
    }
}

static void count_event(void *object, void *argument) {
    (void)object;
    ((fake_counts *)argument)->events++;
}

void streams_count(fake_counts *out) {
    for (struct stream *stream = fake.streams; stream != NULL; stream = stream->next)
        out->streams += !stream->foreign && !stream->destroyed;
    handle_each(EVENT_HANDLE, count_event, out);
}
