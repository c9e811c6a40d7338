/* fst.h - the public C interface of fastst-patch's native engine.
 *
 * The region between "cdef-begin" and "cdef-end" is, word for word, what
 * build_native.py hands to cffi: there is no second declaration to keep in step.
 *
 * What memory looks like, and who owns it:
 *
 *      fst_file ----- open descriptor, refcounted; closed with its last reference; or a
 *        |            callback that gives the bytes (fst_file_feed)
 *        |  held by: a Python handle while open, a running job
 *        v
 *      fst_arena ---- bytes that tensors live in, refcounted; one of
 *        |              a private map of a whole file     (fst_arena_map)
 *        |              anonymous huge-page memory        (fst_arena_alloc)
 *        |              memory of another owner           (fst_arena_borrow)
 *        |              a DLPack struct's, on any device  (fst_arena_adopt)
 *        |  held by: a Python handle, every batch of tensors, a running job
 *        v
 *      batch -------- one block of DLPack structs made by one fst_tensors_import;
 *        |            holds one arena reference until its last tensor dies
 *        v
 *      torch.Tensor - own storage of exactly its size; its deleter (C, needs no
 *                     GIL, takes no lock of ours) drops one count of the batch
 *
 *      fst_job ------ chunks of work for the pool: reads into an arena, uploads of
 *                     host memory into one, or read-ahead beside a map. Holds file and
 *                     arena until the last chunk in flight is finished, whatever its
 *                     owner does.
 *
 * Every create/open pairs with a release. It takes the address of the pointer and clears it, and
 * accepts the address of NULL: a caller can register it before the object exists, so that no
 * interrupt in between leaks the object.
 *
 * Functions return an fst_code and, on anything but FST_OK or FST_PENDING, fill *err (never NULL).
 * All functions may be called from any thread; an fst_layout is read-only after parsing. After
 * fork() the child sees its jobs as cancelled and starts a pool of its own on first use.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* cdef-begin */

/* ---- errors ------------------------------------------------------------- */

enum fst_code {
    FST_OK = 0,
    FST_PENDING = 1,     /* a wait ran into its time limit: call again */
    FST_FALLBACK = 2,    /* it is not certain that stock accepts the file: ask stock */
    FST_E_SYS = 3,       /* a system call failed: sys_errno says how */
    FST_E_NOMEM = 4,     /* no memory for what was asked */
    FST_E_TRUNCATED = 5, /* the file ended before the bytes its header promises */
    FST_E_CANCELLED = 6, /* the job was cancelled, or the process forked */
    FST_E_INVALID = 7,   /* an argument is out of range */
    FST_E_PYTHON = 8,    /* a Python exception is set in the calling thread */
    FST_E_DEVICE = 9,    /* a call of the device's driver failed */
    FST_E_FEED = 10      /* a callback failed: sys_errno is the number that it gave */
};

typedef struct fst_error {
    int code;
    int sys_errno;
    char message[480]; /* names the file, the offset and the cause */
} fst_error;

/* ---- files -------------------------------------------------------------- */

typedef struct fst_file fst_file;

typedef struct fst_file_info {
    uint64_t size; /* bytes */
    uint64_t dev;
    uint64_t ino;
    uint64_t fs_magic; /* statfs f_type */
    int fd;            /* borrowed: valid while the file is held; -1: a fed file */
} fst_file_info;

/* Opens a regular file read-only. Anything else (a directory, a pipe, an absent
 * file) is FST_FALLBACK or FST_E_SYS, and nothing stays open. */
int fst_file_open(const char *path, fst_file **out, fst_file_info *info, fst_error *err);
void fst_file_release(fst_file **file);

/* Fills memory with bytes of a file. Called by the engine's threads, several at a time, and by the
 * caller of fst_file_read; it may block, and may take the GIL. `into` is its own until it returns.
 * Returns how many bytes it has filled, or a negative number for a failure, which comes back in
 * fst_error.sys_errno without its sign. */
typedef int64_t (*fst_feed)(void *context, uint64_t offset, uint64_t bytes, void *into);
/* A file of `size` bytes that come from a callback. It can be read, into any arena, and nothing
 * else: FST_E_INVALID for a map, for what is cached of it, and for jobs with a mode but
 * FST_READ_BUFFERED or with drop_cache. Jobs ask for chunk_bytes at a time; how many calls run at a
 * time adapts to how fast they are. Releasing a job does not wait for a call: what it brings is
 * dropped then. So the context may be used after the last release of the file, by calls that have
 * begun, or are about to.
 *   name   for messages; copied
 *   most   calls at a time, 1..64 */
int fst_file_feed(const char *name, uint64_t size, int32_t most, fst_feed feed, void *context,
                  fst_file **out, fst_file_info *info, fst_error *err);
/* For the end of the process, before callbacks cannot run any more: cancels the jobs on fed files,
 * waits until no callback runs, and from then on calls none. Threads that wait for such a job wait
 * on. The caller makes callbacks return soon. */
void fst_feed_end(void);

/* For files of which only parts are loaded: from now on jobs that read the file through the page
 * cache read the wanted bytes and nothing behind them. They use smaller pages, which takes more
 * processor time. */
void fst_file_read_exactly(fst_file *file);
/* How many are held now. */
uint64_t fst_open_files(void);
/* Bytes of the regular file at a path, without opening it; -1 for anything else. */
int64_t fst_path_bytes(const char *path);
/* Reads exactly length bytes at offset, through the page cache. */
int fst_file_read(fst_file *file, uint64_t offset, void *to, uint64_t length, fst_error *err);

enum fst_probe {
    FST_PROBE_NONE = 0,
    FST_PROBE_CACHESTAT = 1,
    FST_PROBE_MINCORE = 2
};
/* How many bytes of the extent are in the page cache, and by which probe. FST_PROBE_NONE means
 * unknown (*resident is 0 then). Reads nothing of the file and never blocks on I/O. A file that the
 * caller neither owns nor may write is unknown: cachestat refuses it, and mincore claims that all
 * of it is cached. */
int fst_file_residency(fst_file *file, uint64_t offset, uint64_t length, uint64_t *resident,
                       int *probe);

/* ---- header ------------------------------------------------------------- */

enum fst_dtype {
    FST_BOOL,
    FST_F4,
    FST_F6_E2M3,
    FST_F6_E3M2,
    FST_U8,
    FST_I8,
    FST_F8_E5M2,
    FST_F8_E4M3,
    FST_F8_E8M0,
    FST_F8_E4M3FNUZ,
    FST_F8_E5M2FNUZ,
    FST_I16,
    FST_U16,
    FST_F16,
    FST_BF16,
    FST_I32,
    FST_U32,
    FST_F32,
    FST_C64,
    FST_F64,
    FST_I64,
    FST_U64,
    FST_DTYPES
};
/* Bits of one number; 0 for no dtype. A dtype's name is its constant's without FST_. */
uint32_t fst_dtype_bits(uint32_t dtype);

typedef struct fst_tensor {
    uint64_t begin; /* bytes, from the first byte after the header */
    uint64_t end;
    uint64_t dims_index; /* first of ndim entries in fst_layout_view.dims */
    uint32_t ndim;
    uint32_t dtype; /* enum fst_dtype */
} fst_tensor;

typedef struct fst_layout fst_layout;

typedef struct fst_layout_view { /* borrowed from the layout */
    uint64_t count;
    uint64_t data_begin;       /* file offset of the first tensor's bytes */
    const fst_tensor *tensors; /* ordered by (begin, end, place in the header) */
    const int64_t *dims;
    uint64_t dims_count;
    const char *names; /* UTF-8, unescaped, same order, each ended by one NUL */
    uint64_t names_bytes;
    const char *metadata; /* the JSON of "__metadata__", NULL when there is none */
    uint64_t metadata_bytes;
    const char *header; /* all of it, without its length */
    uint64_t header_bytes;
    uint32_t dtypes; /* bit 1 << enum fst_dtype for each dtype that occurs */
    uint32_t odd_f4; /* some F4 tensor has no even last dimension: stock refuses it */
} fst_layout_view;

/* Parses the JSON header (without its 8-byte length) of a file of file_size bytes
 * and validates it as strictly as stock. FST_FALLBACK on anything invalid or merely
 * unusual: the message says what. Copies what it needs. */
int fst_layout_parse(const char *header, uint64_t header_bytes, uint64_t file_size,
                     fst_layout **out, fst_layout_view *view, fst_error *err);
/* Reads a file's header and returns FST_PENDING when its bytes equal those of cached
 * (may be NULL), which then is its layout; else parses it into *out, FST_OK. */
int fst_layout_read(fst_file *file, fst_layout *cached, fst_layout **out, fst_layout_view *view,
                    fst_error *err);
void fst_layout_release(fst_layout **layout);

/* ---- arenas ------------------------------------------------------------- */

typedef struct fst_arena fst_arena;

/* Private, writable map of the whole file: writes never reach the file. */
int fst_arena_map(fst_file *file, fst_arena **out, fst_error *err);
/* Zeroed anonymous memory, 2 MiB aligned, transparent huge pages where allowed. */
int fst_arena_alloc(uint64_t bytes, fst_arena **out, fst_error *err);
/* Memory of another owner; it must outlive every job on the arena. */
int fst_arena_borrow(void *base, uint64_t bytes, fst_arena **out, fst_error *err);
void *fst_arena_data(fst_arena *arena);
uint64_t fst_arena_bytes(fst_arena *arena);
/* Gives up the creator's reference. Read-ahead on a map stops with its last user. */
void fst_arena_release(fst_arena **arena);

/* Memory that a DLManagedTensor (unversioned, contiguous, on any device) describes, as torch
 * exports it. The arena takes the struct over: its deleter is called once, after the last
 * user and the last copy into the memory, from any thread, without the GIL or a lock of ours;
 * torch's own takes the GIL then, since it keeps a Python object.
 * On an error the struct stays the caller's. */
int fst_arena_adopt(uintptr_t managed, fst_arena **out, fst_error *err);
/* The same from a PyObject* of a "dltensor" capsule, which becomes "used_dltensor". Takes the
 * GIL itself. */
int fst_arena_adopt_capsule(uintptr_t capsule, fst_arena **out, fst_error *err);

/* Which of some dicts have one of some objects among their values: found[i] is 1 where dicts[i]
 * does, else 0. Both are PyObject* that the caller keeps alive. Takes the GIL itself, and calls
 * no Python. */
void fst_dicts_holding(const uintptr_t *dicts, uint64_t count, const uintptr_t *objects,
                       uint64_t wanted, uint8_t *found);

/* ---- devices ------------------------------------------------------------ */

enum fst_gpu_kind {
    FST_GPU_CUDA = 0,
    FST_GPU_HIP = 1
};

typedef struct fst_device fst_device;

/* A device of a driver library, used in its primary context. Kept until the process ends: the
 * same library and ordinal give the same object. The first one initialises the driver (cuInit),
 * which must not happen in a process that forks later. library NULL means the driver's usual
 * name; otherwise a path (tests: the fake). FST_E_DEVICE: no library, symbol, driver or device,
 * or the process has forked since; the message says which. The calling thread's current
 * context is left as it was. */
int fst_device_open(int kind, const char *library, int ordinal, fst_device **out, fst_error *err);

typedef struct fst_device_info {
    int32_t kind;
    int32_t ordinal;
    int32_t streams;          /* that copies are spread over */
    int32_t numa_node;        /* the device's, or -1 */
    int32_t integrated;       /* 1: its memory is the host's */
    int32_t host_page_tables; /* 1: it reads pageable memory by the host's page tables */
    uint64_t free_bytes;      /* the driver's own figure, now */
    uint64_t total_bytes;
} fst_device_info;
int fst_device_get_info(fst_device *device, fst_device_info *info, fst_error *err);

/* Cancels every job to a device and returns when nothing of them is in flight: for the end of
 * the process, before drivers unload. */
void fst_device_quiesce(void);

/* Reads device memory back and compares it with the file: FST_OK with *equal set. Waits for
 * nothing but its own copy: the bytes must have landed. Leaves nothing more of the file in the
 * page cache than was there. */
int fst_device_compare(fst_device *device, fst_arena *arena, uint64_t arena_offset, fst_file *file,
                       uint64_t file_offset, uint64_t bytes, int32_t *equal, fst_error *err);

/* ---- jobs --------------------------------------------------------------- */

typedef struct fst_segment {
    uint64_t file_offset; /* of an upload: an address of host memory */
    uint64_t bytes;
    uint64_t arena_offset; /* ignored by read-ahead: a map keeps the file's offsets */
} fst_segment;

enum fst_read_mode {
    FST_READ_BUFFERED = 0,
    FST_READ_DIRECT = 1,
    FST_READ_DIRECT_IF_COLD = 2, /* what the page cache holds is taken from there */
    FST_READ_GDS = 3             /* cuFile; devices only */
};

typedef struct fst_job_options {
    uint32_t struct_bytes;  /* sizeof(fst_job_options), for growth */
    int32_t threads;        /* 1..64 */
    uint64_t chunk_bytes;   /* 64 KiB..64 MiB, rounded up to pages */
    int32_t mode;           /* enum fst_read_mode; reads only, else 0 */
    int32_t drop_cache;     /* reads only: evict each chunk from the page cache once read */
    uint64_t reserve_bytes; /* read-ahead stops when less memory than this is left */
    /* Into device memory: through pinned slots, copied on streams of our own. */
    fst_device *device;    /* NULL: the arena is host memory */
    uintptr_t stream;      /* the one the arena was allocated on: copies wait for what is
                              pending there when the job starts */
    uint64_t pinned_bytes; /* most host memory pinned by the process */
} fst_job_options;

typedef struct fst_job_stats {
    uint64_t bytes_total;
    uint64_t bytes_done;
    uint64_t bytes_cold;    /* of those done: not in the page cache beforehand */
    uint64_t bytes_skipped; /* read-ahead given up: memory low, cancelled, unreadable */
    uint64_t bytes_direct;  /* moved by O_DIRECT */
    uint64_t bytes_gds;     /* moved by cuFile */
    int32_t direct_errno;   /* why O_DIRECT was given up for buffered reads, or 0 */
    int32_t done;
    int32_t gds_refused; /* cuFile was given up for the ring */
    char gds_note[120];  /* why cuFile was given up, or how it works here; or empty */
} fst_job_stats;

typedef struct fst_job fst_job;

/* Pulls the segments of a mapped file into the page cache and the page table, in
 * the order given, and returns at once. Errors only stop it: the map still works. */
int fst_job_prefetch(fst_file *file, fst_arena *map, const fst_segment *segments, uint64_t count,
                     const fst_job_options *options, fst_job **out, fst_error *err);
/* Advice that all processes of this load use only these extents of the file, ordered by file
 * offset. Faults near other parts of the map then read nothing of them. To be called before the map
 * is touched. Read-ahead that gives up takes the advice back. */
void fst_arena_keep_to(fst_arena *map, const fst_segment *wanted, uint64_t count);
/* Reads the segments (ordered by file offset, not overlapping) into the arena. */
int fst_job_read(fst_file *file, fst_arena *arena, const fst_segment *segments, uint64_t count,
                 const fst_job_options *options, fst_job **out, fst_error *err);
/* Copies host memory into an arena of options->device, which an upload must have; what
 * concerns files (mode, drop_cache, reserve_bytes) must be 0. In its segments, and in
 * fst_job_wait_until, file_offset is an address; they are ordered by it and do not overlap. The
 * memory is the caller's: readable and unchanged until the job is done or released. Reading a
 * map whose file was truncated raises SIGBUS, as any reading of it does. Segments that follow
 * each other both here and in the arena, there less than 256 bytes apart, go in one copy: what
 * is between them becomes zeros, unless the arena is borrowed. */
int fst_job_upload(fst_arena *arena, const fst_segment *segments, uint64_t count,
                   const fst_job_options *options, fst_job **out, fst_error *err);
/* FST_PENDING after timeout_ms; else the job's result, with nothing left in flight. */
int fst_job_wait(fst_job *job, int timeout_ms, fst_error *err);
/* The same for the bytes before a file offset only: FST_OK once they have landed. */
int fst_job_wait_until(fst_job *job, uint64_t file_offset, int timeout_ms, fst_error *err);
void fst_job_cancel(fst_job *job);
void fst_job_get_stats(fst_job *job, fst_job_stats *stats);
void fst_job_release(fst_job **job);

/* ---- tensors ------------------------------------------------------------ */

typedef struct fst_dl_dtype { /* how torch takes a dtype, probed once */
    uint8_t code;
    uint8_t bits;
    uint8_t as_bytes; /* import as 1-D uint8; the caller views it */
    uint8_t known;    /* 0: torch cannot hold it */
} fst_dl_dtype;

/* Appends one tensor per index to a Python list, all over one arena.
 *   view           count, tensors and dims: a layout's, or others that are as sound
 *   which/count    indices into its tensors; which == NULL means 0..count-1
 *   offsets        arena offset of each; NULL means file_base + begin
 *   exchange_api   pointer from torch's "dlpack_exchange_api" capsule, or 0
 *   from_dlpack    PyObject* taking a "dltensor" capsule, used when that is 0
 *   list           PyObject* of a list the caller holds for the whole call
 * Takes the GIL itself. FST_E_PYTHON leaves the exception set by torch fetched and
 * printed into err->message; tensors already appended stay valid. */
int fst_tensors_import(fst_arena *arena, const fst_layout_view *view, const uint64_t *which,
                       uint64_t count, const uint64_t *offsets, uint64_t file_base,
                       const fst_dl_dtype *table, uintptr_t exchange_api, uintptr_t from_dlpack,
                       uintptr_t list, fst_error *err);

typedef struct fst_np_dtype { /* a dtype of NumPy's */
    uintptr_t dtype;          /* PyObject*, kept by the caller; 0: not known */
    uint32_t itemsize;
    uint32_t alignment;
} fst_np_dtype;

/* Appends one NumPy array per index to a Python list, all over one object's memory. Each is a view
 * of an array of its own size, as stock's are.
 *   view, which, count, file_base, list   as of fst_tensors_import
 *   offsets        in the memory; NULL means file_base + begin
 *   frombuffer     PyObject* of numpy.frombuffer
 *   memory         PyObject* that it takes the memory of
 * Appends None for an array that has no bytes, or is not aligned; *left says how many. Takes the
 * GIL, and fails, as fst_tensors_import does. */
int fst_arrays_make(const fst_layout_view *view, const uint64_t *which, uint64_t count,
                    const uint64_t *offsets, uint64_t file_base, const fst_np_dtype *table,
                    uintptr_t frombuffer, uintptr_t memory, uintptr_t list, uint64_t *left,
                    fst_error *err);

/* ---- machine ------------------------------------------------------------ */

/* Memory this process may still take: the least of MemAvailable and the cgroups'
 * headroom (cached pages count as free). UINT64_MAX when neither is known. */
uint64_t fst_memory_headroom(void);

/* Asks for huge pages where memory of the caller is not touched yet: for those that lie in it as a
 * whole. With `fill` they are taken now, each filled with zeros where it has no content. What the
 * caller or others write there meanwhile stays. Returns the processor time that this took, in
 * nanoseconds; UINT64_MAX where the system refuses (Linux before 5.14 refuses to fill). */
uint64_t fst_memory_huge(void *begin, uint64_t bytes, int fill);

typedef struct fst_pool_stats {
    int32_t threads;
    int32_t jobs;
    uint64_t arenas;      /* alive */
    uint64_t arena_bytes; /* alive, anonymous */
    uint64_t files;       /* open */
    uint64_t fed_files;   /* held, too; these have no descriptor */
    uint64_t bytes_prefetched;
    uint64_t bytes_buffered;
    uint64_t bytes_direct;
    uint64_t bytes_fed;      /* by callbacks */
    uint64_t link_rate;      /* bytes a second that callbacks gave, when as many ran as helped */
    uint64_t link_measured;  /* times that this was measured, so far */
    uint64_t bytes_copied;   /* to devices */
    uint64_t bytes_uploaded; /* of those: from host memory, not from files */
    uint64_t pinned_bytes;   /* now */
    uint64_t pinned_nanoseconds; /* that pinning has taken so far */
} fst_pool_stats;

void fst_pool_get_stats(fst_pool_stats *stats);
/* Waits for jobs in flight, then ends the workers and frees their buffers, pinned ones too.
 * The next job starts them again. */
void fst_pool_shutdown(void);

/* ---- measuring ---------------------------------------------------------- */

/* Reads every byte once and returns an order-sensitive 64-bit checksum. */
uint64_t fst_touch(const void *data, uint64_t bytes);

/* Raw parallel read of a file into small reused buffers, nothing kept: what the
 * storage (direct = 1) or page cache (direct = 0) can give at most. */
int fst_read_ceiling(const char *path, int direct, int threads, uint64_t chunk_bytes,
                     uint64_t *bytes, double *seconds, fst_error *err);

/* ---- fault injection (tests) -------------------------------------------- */

/* Makes calls number first .. first+count-1 (from 1) of the named system call fail
 * with sys_errno, or, when sys_errno is 0, be cut to at most short_bytes bytes.
 * Names: open stat fstat pread preadv preadv2 mmap madvise readahead cachestat mincore
 * fadvise pthread_create. Returns 0, or -1 for an unknown name. */
int fst_fault_set(const char *name, uint64_t first, uint64_t count, int sys_errno,
                  uint64_t short_bytes);
/* Calls seen since the last clear, while a fault was set. */
uint64_t fst_fault_calls(const char *name);
void fst_fault_clear(void);

/* cdef-end */
