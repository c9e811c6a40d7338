/* fst_file.h - an open file: identity, descriptors of the same inode, what is cached of it. */
#pragma once

#include "file/fst_feed.h"

struct fst_file {
    atomic_uint refs;
    atomic_bool exactly; /* see fst_file_read_exactly */
    atomic_int hint_fd;  /* of the same inode, for fst_file_has_page; -1 until it is needed */
    atomic_llong window; /* see fst_file_window; -1 until it is needed */
    int fd;              /* -1: a fed file */
    fst_fed *fed;        /* of a fed file, which has nothing else but its size; else NULL */
    fst_file_info info;
    char path[]; /* for messages only: what was opened is fd */
};

void fst_file_retain(fst_file *file);
void fst_file_unref(fst_file *file); /* accepts NULL */
/* The name of a job's source in messages: the file's path, or host memory. */
const char *fst_source_name(const fst_file *file);
/* FST_E_TRUNCATED: the file ends at an offset before the bytes its header promises. */
int fst_file_truncated(const fst_file *file, uint64_t offset, fst_error *err);
/* After a read of bytes before `end`: FST_E_TRUNCATED if the file has become shorter. The kernel
 * first sets its size and then clears the rest of its last page, of up to 2 MiB. So a read that is
 * copying that page returns zeros, and no error. */
int fst_file_check_end(const fst_file *file, uint64_t end, fst_error *err);
/* FST_E_INVALID for a fed file, which lacks `what`; else, and for NULL, FST_OK. */
int fst_file_refuse_fed(const fst_file *file, const char *what, fst_error *err);
/* A second descriptor of the same inode, for O_DIRECT. -1 with errno set. */
int fst_file_open_direct(const fst_file *file);
/* A second open file description of the same inode, with read-ahead of its own. -1 with errno. */
int fst_file_open_again(const fst_file *file);
/* How many bytes the kernel reads ahead of a fault, by its setting for the device; 0: unknown. */
uint64_t fst_file_window(fst_file *file);
/* Whether the page at an offset is cached and up to date: a hint for files that no probe can see.
 * If it is not, that page alone is read. */
bool fst_file_has_page(fst_file *file, uint64_t offset);
/* Evicts the file from the page cache, unless another process uses it. Takes milliseconds. */
void fst_file_drop_cache(fst_file *file);
