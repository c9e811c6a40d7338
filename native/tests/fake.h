/* fake.h - a fake driver as new for each case, and short names for what cases do with it. */
#ifndef FST_TEST_FAKE_H
#define FST_TEST_FAKE_H

#include "test.h"

#include "fake_open.h"

enum {
    BYTES = 8192,
    NON_BLOCKING = 1
};

/* Checks that one violation more has been seen. */
#define BITES(statement)                                                                           \
    do {                                                                                           \
        uint64_t violations_before = FAKE(fake_violations)();                                      \
        statement;                                                                                 \
        CHECK_EQ(FAKE(fake_violations)(), violations_before + 1);                                  \
    } while (0)

static unsigned char slot[BYTES], other_slot[BYTES];

static inline bool all(const void *bytes, size_t count, int value) {
    const unsigned char *byte = bytes;
    for (size_t i = 0; i < count; i++)
        if (byte[i] != value) return false;
    return true;
}

/* A driver as new, with device 0's context current. */
static inline void begin(void) {
    uintptr_t context;
    FAKE(fake_reset)();
    memset(slot, 1, sizeof slot);
    memset(other_slot, 2, sizeof other_slot);
    MUST(FAKE(cuInit)(0) == 0);
    MUST(FAKE(cuDevicePrimaryCtxRetain)(&context, 0) == 0);
    MUST(FAKE(cuCtxPushCurrent_v2)(context) == 0);
    MUST(FAKE(cuMemHostRegister_v2)(slot, sizeof slot, 0) == 0);
    MUST(FAKE(cuMemHostRegister_v2)(other_slot, sizeof other_slot, 0) == 0);
}

static inline void end(uint64_t violations) {
    if (!CHECK_EQ(FAKE(fake_violations)(), violations))
        for (uint64_t i = 0; i < FAKE(fake_violations)(); i++)
            (void)fprintf(stderr, "    %s\n", FAKE(fake_violation_text)(i));
    FAKE(fake_reset)();
}

static inline uintptr_t stream_new(void) {
    uintptr_t stream = 0;
    MUST(FAKE(cuStreamCreate)(&stream, NON_BLOCKING) == 0);
    return stream;
}

static inline uintptr_t event_new(void) {
    uintptr_t event = 0;
    MUST(FAKE(cuEventCreate)(&event, 2) == 0);
    return event;
}

static inline uintptr_t alloc(size_t bytes) {
    uintptr_t memory = 0;
    MUST(FAKE(cuMemAlloc_v2)(&memory, bytes) == 0);
    return memory;
}

static inline void copy_in(uintptr_t to, const void *from, uintptr_t stream) {
    CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)(to, from, BYTES, stream), 0);
}

#endif
