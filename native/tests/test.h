/* test.h - checks, files with known bytes, and "nothing is left over".
 *
 * A test program runs its cases with RUN and returns test_result(). Exit status: 0 passed,
 * 1 failed, 77 nothing could be tested here. After every case no arena, file, job, thread
 * or descriptor of the engine may be left, whatever the case did.
 */
#ifndef FST_TEST_H
#define FST_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fst.h"

#define WATCHDOG_SECONDS 120 /* a case that hangs ends the program */

/* TSan supports no threads in the child of a process that had some, and is slow. */
#if defined __has_feature
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#ifdef __SANITIZE_THREAD__
#define UNDER_TSAN 1
#else
#define UNDER_TSAN 0
#endif

static int test_failures;
static const char *test_case = "";

/* ---- checks ---- */

static inline bool test_check(bool ok, const char *file, int line, const char *text) {
    if (!ok) {
        test_failures++;
        (void)fprintf(stderr, "%s:%d: %s: not true: %s\n", file, line, test_case, text);
    }
    return ok;
}

static inline bool test_equal(long long a, long long b, const char *file, int line,
                              const char *text) {
    if (a != b) {
        test_failures++;
        (void)fprintf(stderr, "%s:%d: %s: %lld is not %lld: %s\n", file, line, test_case, a, b,
                      text);
    }
    return a == b;
}

#define CHECK(condition) test_check((condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) test_equal((long long)(a), (long long)(b), __FILE__, __LINE__, #a " == " #b)

#define FAIL(text) ((void)test_check(false, __FILE__, __LINE__, text))

/* What later steps cannot do without. */
#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!CHECK(condition)) exit(1);                                                            \
    } while (0)

/* ---- random numbers that are the same everywhere ---- */

static inline uint64_t test_random(uint64_t *state) { /* xorshift64* */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(2685821657736338717);
}

static inline uint64_t test_below(uint64_t *state, uint64_t n) { return test_random(state) % n; }

/* ---- files with known bytes ---- */

/* The byte at an offset of a file; depends on every bit of the offset. */
static inline unsigned char test_byte(uint64_t offset, uint64_t salt) {
    return (unsigned char)((offset + salt * 977 + 1) * UINT64_C(0x9e3779b97f4a7c15) >> 56);
}

typedef struct test_file {
    char path[512];
    uint64_t size;
    uint64_t salt;
} test_file;

static inline const char *test_folder(void) {
    const char *folder = getenv("TMPDIR");
    return folder == NULL || folder[0] == '\0' ? "." : folder;
}

static inline void test_write_pattern(int fd, uint64_t size, uint64_t salt) {
    static unsigned char buffer[64 << 10];
    for (uint64_t at = 0; at < size;) {
        uint64_t n = size - at < sizeof buffer ? size - at : sizeof buffer;
        for (uint64_t i = 0; i < n; i++) buffer[i] = test_byte(at + i, salt);
        MUST(write(fd, buffer, (size_t)n) == (ssize_t)n);
        at += n;
    }
}

static inline test_file test_create(uint64_t size, uint64_t salt) {
    test_file made = {.size = size, .salt = salt};
    int length = snprintf(made.path, sizeof made.path, "%s/fst_test_XXXXXX", test_folder());
    MUST(length > 0 && (size_t)length < sizeof made.path);
    int fd = mkstemp(made.path);
    MUST(fd >= 0);
    test_write_pattern(fd, size, salt);
    MUST(fsync(fd) == 0 && close(fd) == 0); /* clean pages can be dropped */
    return made;
}

static inline test_file test_create_text(const void *content, size_t bytes) {
    test_file made = test_create(0, 0);
    int fd = open(made.path, O_WRONLY);
    MUST(fd >= 0 && write(fd, content, bytes) == (ssize_t)bytes && close(fd) == 0);
    made.size = bytes;
    return made;
}

static inline void test_remove(test_file *file) { (void)unlink(file->path); }

static inline fst_file *test_open(const test_file *file) {
    fst_file *opened = NULL;
    fst_file_info info;
    fst_error err = {0};
    if (fst_file_open(file->path, &opened, &info, &err) != FST_OK)
        (void)fprintf(stderr, "%s\n", err.message);
    MUST(opened != NULL);
    return opened;
}

/* Whether O_DIRECT reads work where test files are made. */
static inline bool test_direct_works(void) {
    test_file file = test_create(8192, 1);
    void *buffer = NULL;
    int fd = open(file.path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    bool works = fd >= 0 && posix_memalign(&buffer, 4096, 4096) == 0 &&
                 pread(fd, buffer, 4096, 4096) == 4096;
    free(buffer);
    if (fd >= 0) (void)close(fd);
    test_remove(&file);
    return works;
}

static inline void test_skip(const char *what, const char *why) {
    (void)printf("    skipped: %s: %s\n", what, why);
}

/* ---- nothing is left over ---- */

static inline int test_descriptors(void) {
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;
    if (folder == NULL) return -1;
    while (readdir(folder) != NULL) count++;
    (void)closedir(folder);
    return count;
}

static inline void test_nothing_left(int descriptors) {
    fst_pool_stats stats;
    fst_fault_clear();
    fst_pool_shutdown(); /* finishes what was released unfinished */
    fst_pool_get_stats(&stats);
    CHECK_EQ(stats.threads, 0);
    CHECK_EQ(stats.jobs, 0);
    CHECK_EQ(stats.arenas, 0);
    CHECK_EQ(stats.arena_bytes, 0);
    CHECK_EQ(stats.files, 0);
    CHECK_EQ(stats.fed_files, 0);
    CHECK_EQ(test_descriptors(), descriptors);
}

#define RUN(function)                                                                              \
    do {                                                                                           \
        int descriptors_before = test_descriptors();                                               \
        test_case = #function;                                                                     \
        (void)alarm(WATCHDOG_SECONDS);                                                             \
        function();                                                                                \
        test_nothing_left(descriptors_before);                                                     \
        (void)alarm(0);                                                                            \
    } while (0)

static inline int test_result(void) {
    if (test_failures > 0) (void)fprintf(stderr, "%d checks failed\n", test_failures);
    return test_failures > 0;
}

#endif
