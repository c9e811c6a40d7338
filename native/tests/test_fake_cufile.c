/* test_fake_cufile.c - the fake cuFile refuses what the real one refuses. */
#include "fake.h"

static void test_cufile(void) {
    void *handle = NULL;
    test_file made = test_create(2 * BYTES + 100, 3);
    begin();
    uintptr_t memory = alloc(1 << 20);
    fake_file_descriptor file = {.type = 1, .handle.fd = open(made.path, O_RDONLY | O_CLOEXEC)};
    MUST(file.handle.fd >= 0);
    CHECK_EQ(FAKE(cuFileHandleRegister)(&handle, &file).error, 5001);
    CHECK_EQ(FAKE(cuFileDriverOpen)().error, 0);
    CHECK_EQ(FAKE(cuFileHandleRegister)(&handle, &file).error, 0);
    CHECK_EQ(FAKE(cuFileBufRegister)((void *)memory, 1 << 20, 0).error, 0);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, BYTES, 4096), BYTES);
    for (uint64_t i = 0; i < BYTES; i++)
        if (!CHECK_EQ(((unsigned char *)memory)[4096 + i], test_byte(BYTES + i, 3))) break;
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, 3 * BYTES, 0, 0), 2 * BYTES + 100);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 0, 512), -5022);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 512, 0), -5022);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, 512, 0, 0), -5022);
    BITES(CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 0, 1 << 20), -5012));
    CHECK_EQ(FAKE(fake_fail)("cuFileRead", FAKE(fake_calls)("cuFileRead") + 1, 1, EIO), 0);
    CHECK_EQ(FAKE(cuFileRead)(handle, (void *)memory, BYTES, 0, 0), -1);
    BITES((void)FAKE(cuMemFree_v2)(memory)); /* still registered */
    CHECK_EQ(FAKE(cuFileBufDeregister)((void *)memory).error, 0);
    (void)close(file.handle.fd);
    BITES(FAKE(cuFileHandleDeregister)(handle)); /* after its descriptor is gone */
    CHECK_EQ(FAKE(cuFileDriverClose)().error, 0);
    end(3);
    test_remove(&made);
}

static void test_cufile_closes_stdin(void) {
    begin();
    int saved = dup(STDIN_FILENO);
    int before = saved >= 0 ? saved : open("/dev/null", O_RDONLY);
    MUST(dup2(before, STDIN_FILENO) == STDIN_FILENO);
    FAKE(fake_close_stdin)(1);
    CHECK_EQ(FAKE(cuFileDriverOpen)().error, 0);
    CHECK(fcntl(STDIN_FILENO, F_GETFD) < 0);
    MUST(dup2(before, STDIN_FILENO) == STDIN_FILENO);
    (void)close(before);
    end(0);
}

int main(void) {
    FAKE(fake_reset)(); /* opened before descriptors are counted */
    RUN(test_cufile);
    RUN(test_cufile_closes_stdin);
    return test_result();
}
