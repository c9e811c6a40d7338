/* test_file.c - open files, arenas and residency probes, and what they do when refused. */
#include "test.h"

static int open_code(const char *path, fst_error *err) {
    fst_file *file = NULL;
    fst_file_info info;
    int code = fst_file_open(path, &file, &info, err);
    CHECK((file != NULL) == (code == FST_OK));
    fst_file_release(&file);
    return code;
}

static void test_open_errors(void) {
    test_file file = test_create(10, 1);
    fst_error err = {0};
    char pipe_path[600];
    CHECK_EQ(fst_fault_set("open", UINT64_MAX, 1, EIO, 0), 0); /* counts */
    uint64_t opened = fst_fault_calls("open");
    CHECK_EQ(open_code(test_folder(), &err), FST_FALLBACK);
    CHECK_EQ(open_code("/dev/null", &err), FST_FALLBACK);
    CHECK_EQ(fst_fault_calls("open"), opened); /* neither was opened */
    CHECK_EQ(open_code("/no/such/file", &err), FST_E_SYS);
    CHECK_EQ(err.sys_errno, ENOENT);
    (void)snprintf(pipe_path, sizeof pipe_path, "%s.pipe", file.path);
    MUST(mkfifo(pipe_path, 0600) == 0);
    CHECK_EQ(open_code(pipe_path, &err), FST_FALLBACK); /* and does not wait for a writer */
    CHECK_EQ(fst_fault_calls("open"), opened);
    (void)unlink(pipe_path);
    CHECK_EQ(fst_fault_set("open", 1, 1, EMFILE, 0), 0);
    CHECK_EQ(open_code(file.path, &err), FST_E_SYS);
    CHECK(err.sys_errno == EMFILE && strstr(err.message, file.path) != NULL);
    CHECK_EQ(fst_fault_set("stat", 1, 1, EACCES, 0), 0);
    CHECK_EQ(open_code(file.path, &err), FST_E_SYS);
    CHECK_EQ(err.sys_errno, EACCES);
    CHECK_EQ(fst_fault_set("fstat", 1, 1, EIO, 0), 0);
    CHECK_EQ(open_code(file.path, &err), FST_E_SYS);
    CHECK_EQ(err.sys_errno, EIO);
    CHECK_EQ(open_code(file.path, &err), FST_OK);
    CHECK_EQ(fst_fault_set("no_such_call", 1, 1, EIO, 0), -1);
    fst_fault_clear();
    test_remove(&file);
}

static void test_file_read(void) {
    test_file file = test_create(100000, 1);
    fst_file *opened = test_open(&file);
    fst_error err = {0};
    unsigned char bytes[5000];
    CHECK_EQ(fst_fault_set("pread", 1, UINT64_MAX, 0, 999), 0);
    CHECK_EQ(fst_file_read(opened, 77, bytes, sizeof bytes, &err), FST_OK);
    for (uint64_t i = 0; i < sizeof bytes; i++) CHECK(bytes[i] == test_byte(77 + i, 1));
    fst_fault_clear();
    CHECK_EQ(fst_file_read(opened, 99999, bytes, 2, &err), FST_E_TRUNCATED);
    CHECK_EQ(fst_file_read(opened, 100000, bytes, 0, &err), FST_OK);
    CHECK_EQ(fst_file_read(opened, UINT64_MAX, bytes, 1, &err), FST_E_INVALID);
    CHECK_EQ(fst_file_read(opened, INT64_MAX, bytes, 1, &err), FST_E_INVALID);
    fst_file_release(&opened);
    test_remove(&file);
}

static void test_arenas(void) {
    static const uint64_t sizes[] = {0,      1, 4095, 4097, (2 << 20) - 1, 2 << 20, (2 << 20) + 1,
                                     5 << 20};
    fst_error err = {0};
    fst_arena *arena = NULL;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        MUST(fst_arena_alloc(sizes[i], &arena, &err) == FST_OK);
        unsigned char *data = fst_arena_data(arena);
        CHECK_EQ(fst_arena_bytes(arena), sizes[i]);
        CHECK_EQ((uintptr_t)data % (sizes[i] >= 2 << 20 ? 2 << 20 : 4096), 0);
        for (uint64_t k = 0; k < sizes[i]; k += 4095) CHECK(data[k] == 0);
        memset(data, 1, sizes[i]);
        fst_arena_release(&arena);
    }
    CHECK_EQ(fst_arena_alloc(UINT64_MAX, &arena, &err), FST_E_NOMEM);
    CHECK_EQ(fst_arena_alloc(INT64_MAX, &arena, &err), FST_E_NOMEM);
    CHECK(arena == NULL);
    fst_arena_release(&arena);
}

static void test_arena_faults(void) {
    test_file file = test_create(10000, 1), empty = test_create(0, 1);
    fst_file *opened = test_open(&file), *nothing = test_open(&empty);
    fst_error err = {0};
    fst_arena *arena = NULL;
    CHECK_EQ(fst_arena_map(nothing, &arena, &err), FST_E_INVALID);
    CHECK_EQ(fst_fault_set("mmap", 1, 2, ENOMEM, 0), 0);
    CHECK_EQ(fst_arena_map(opened, &arena, &err), FST_E_NOMEM);
    CHECK_EQ(fst_arena_alloc(10000, &arena, &err), FST_E_NOMEM);
    CHECK_EQ(fst_fault_set("mmap", 1, 1, EACCES, 0), 0);
    CHECK_EQ(fst_arena_map(opened, &arena, &err), FST_E_SYS);
    CHECK(err.sys_errno == EACCES && strstr(err.message, file.path) != NULL && arena == NULL);
    fst_fault_clear();
    MUST(fst_arena_map(opened, &arena, &err) == FST_OK);
    unsigned char *data = fst_arena_data(arena), before;
    CHECK(data[0] == test_byte(0, 1));
    data[0] ^= 0xFF; /* private: the file must not change */
    CHECK_EQ(fst_file_read(opened, 0, &before, 1, &err), FST_OK);
    CHECK_EQ(before, test_byte(0, 1));
    fst_arena_release(&arena);
    fst_file_release(&opened);
    fst_file_release(&nothing);
    test_remove(&file);
    test_remove(&empty);
}

static int probe_of(fst_file *file, uint64_t offset, uint64_t length) {
    uint64_t resident = UINT64_MAX;
    int probe = -1;
    CHECK_EQ(fst_file_residency(file, offset, length, &resident, &probe), FST_OK);
    CHECK(resident <= length && (probe != FST_PROBE_NONE || resident == 0));
    return probe;
}

/* Each probe that fails means the next one, and at last "unknown". */
static void test_residency(void) {
    test_file file = test_create((1 << 20) + 5, 1);
    fst_file *opened = test_open(&file);
    uint64_t resident = 0;
    int probe = 0;
    CHECK_EQ(probe_of(opened, file.size, 10), FST_PROBE_NONE);
    CHECK_EQ(probe_of(opened, UINT64_MAX, UINT64_MAX), FST_PROBE_NONE);
    CHECK_EQ(probe_of(opened, 0, 0), FST_PROBE_NONE);
    (void)probe_of(opened, 5, UINT64_MAX); /* as far as the file goes */
    static const int not_there[] = {ENOSYS, EPERM, EOPNOTSUPP, EINVAL};
    for (size_t i = 0; i < sizeof not_there / sizeof *not_there; i++) {
        CHECK_EQ(fst_fault_set("cachestat", 1, UINT64_MAX, not_there[i], 0), 0);
        CHECK_EQ(probe_of(opened, 3, 500000), FST_PROBE_MINCORE); /* our own file */
        MUST(fst_file_residency(opened, 3, 500000, &resident, &probe) == FST_OK);
        CHECK_EQ(fst_fault_set("fstat", 1, 1, EIO, 0), 0);
        CHECK_EQ(probe_of(opened, 3, 500000), FST_PROBE_NONE); /* whose file it is, unknown */
        CHECK_EQ(fst_fault_set("mmap", 1, 1, ENOMEM, 0), 0);
        CHECK_EQ(probe_of(opened, 3, 500000), FST_PROBE_NONE);
        CHECK_EQ(fst_fault_set("mincore", 1, UINT64_MAX, not_there[i], 0), 0);
        CHECK_EQ(probe_of(opened, 3, 500000), FST_PROBE_NONE);
        fst_fault_clear();
    }
    /* None of them reads: that would spoil the answer to the next question. */
    CHECK_EQ(fst_fault_set("cachestat", 1, UINT64_MAX, EPERM, 0), 0);
    CHECK_EQ(fst_fault_set("mincore", 1, UINT64_MAX, ENOSYS, 0), 0);
    CHECK_EQ(probe_of(opened, 0, file.size), FST_PROBE_NONE);
    CHECK_EQ(fst_fault_calls("preadv2") + fst_fault_calls("pread") + fst_fault_calls("preadv"), 0);
    fst_fault_clear();
    fst_file_release(&opened);
    test_remove(&file);
}

int main(void) {
    RUN(test_open_errors);
    RUN(test_file_read);
    RUN(test_arenas);
    RUN(test_arena_faults);
    RUN(test_residency);
    return test_result();
}
