/* test_fake_blocks.c - blocks of the fake's caching allocator have work pending, and are watched.
 */
#include "fake.h"

#include <pthread.h>

#include "tensor/fst_dlpack.h"

static dl_managed *block_new(uint64_t bytes, uintptr_t stream) {
    void *managed = NULL;
    MUST(FAKE(fake_block)(bytes, 0, stream, &managed) == 0);
    return managed;
}

static void *delete_block(void *managed) {
    ((dl_managed *)managed)->deleter(managed);
    return NULL;
}

static void test_blocks_have_work_pending(void) {
    begin();
    uintptr_t stream = stream_new(), theirs = FAKE(fake_stream)(0), event = event_new();
    dl_managed *block = block_new(BYTES, theirs);
    uintptr_t memory = (uintptr_t)block->tensor.data;
    CHECK(block->tensor.ndim == 1 && block->tensor.shape[0] == BYTES);
    CHECK(block->tensor.device.type == DL_CPU && block->tensor.dtype.bits == 8);
    CHECK(memory % 512 == 0 && memory % 4096 != 0);
    copy_in(memory, slot, stream);
    CHECK_EQ(FAKE(cuStreamSynchronize)(stream), 0);
    CHECK(all((void *)memory, BYTES, 1));
    FAKE(fake_drain)();
    CHECK(all((void *)memory, BYTES, FAKE_LATE)); /* did not wait */
    block->deleter(block);
    CHECK(all((void *)memory, BYTES, FAKE_FREED));
    block = block_new(BYTES, theirs);
    memory = (uintptr_t)block->tensor.data;
    CHECK_EQ(FAKE(cuEventRecord)(event, theirs), 0);
    CHECK_EQ(FAKE(cuStreamWaitEvent)(stream, event, 0), 0);
    copy_in(memory, slot, stream);
    FAKE(fake_drain)();
    CHECK(all((void *)memory, BYTES, 1)); /* waited */
    pthread_t thread;
    MUST(pthread_create(&thread, NULL, delete_block, block) == 0);
    MUST(pthread_join(thread, NULL) == 0);
    end(0);
}

static void test_blocks_freed_too_early(void) {
    begin();
    uintptr_t stream = stream_new(), theirs = FAKE(fake_stream)(0);
    dl_managed *block = block_new(BYTES, theirs);
    copy_in((uintptr_t)block->tensor.data, slot, stream);
    BITES(block->deleter(block));
    block = block_new(BYTES, theirs);
    copy_in((uintptr_t)block->tensor.data, slot, theirs); /* its own stream's order is enough */
    block->deleter(block);
    FAKE(fake_drain)();
    end(1);
}

static void test_blocks_are_reused(void) {
    begin();
    uintptr_t theirs = FAKE(fake_stream)(0);
    dl_managed *block = block_new(BYTES, theirs), *next;
    void *memory = block->tensor.data;
    block->deleter(block);
    next = block_new(BYTES, theirs);
    CHECK(next->tensor.data != memory); /* quarantined */
    FAKE(fake_quarantine)(0);
    memory = next->tensor.data;
    next->deleter(next);
    block = block_new(BYTES / 2, theirs);
    CHECK(block->tensor.data == memory);
    FAKE(fake_drain)();
    CHECK(all(memory, BYTES / 2, FAKE_LATE));
    end(0);
    CHECK(all(memory, BYTES / 2, FAKE_LATE)); /* lives on after the reset in end() */
    block->deleter(block);
}

static void *data_of(const dl_managed *block) { return block->tensor.data; }

/* What torch's allocator does with a block that was used on another stream. */
static void test_blocks_are_reused_on_their_stream(void) {
    begin();
    uintptr_t theirs = FAKE(fake_stream)(0), other = FAKE(fake_stream)(0);
    FAKE(fake_quarantine)(0);
    dl_managed *block = block_new(BYTES, theirs), *next;
    void *memory = data_of(block);
    block->deleter(block);
    next = block_new(BYTES, other);
    CHECK(data_of(next) != memory);
    block = block_new(BYTES, theirs);
    CHECK(data_of(block) == memory);
    block->deleter(block);
    next->deleter(next);
    end(0);
}

static int64_t one_dimension[] = {BYTES}, one_step[] = {1};

static int copy_late(void *to, const void *from, uintptr_t stream) {
    return FAKE(fake_copy_strided)((uintptr_t)to, (uintptr_t)from, 1, one_dimension, one_step, 1, 0,
                                   stream);
}

/* Of a block that other streams still read when it is freed, without record_stream and with. */
static void check_used_elsewhere(bool recorded) {
    begin();
    uintptr_t theirs = FAKE(fake_stream)(0), other = FAKE(fake_stream)(0);
    dl_managed *block = block_new(BYTES, theirs), *seen = block_new(BYTES, other), *next;
    void *memory = data_of(block);
    FAKE(fake_quarantine)(0);
    CHECK_EQ(FAKE(fake_synchronize)(0, theirs), 0);
    memset(memory, 5, BYTES);
    CHECK_EQ(copy_late(data_of(seen), memory, other), 0);
    if (recorded) CHECK_EQ(FAKE(fake_record_stream)((uintptr_t)memory, other), 0);
    if (recorded)
        block->deleter(block);
    else
        BITES(block->deleter(block));
    next = block_new(BYTES, theirs);
    CHECK_EQ(data_of(next) == memory, !recorded);
    CHECK_EQ(FAKE(fake_synchronize)(0, theirs), 0);
    CHECK_EQ(FAKE(fake_synchronize)(0, other), 0);
    CHECK_EQ(all(data_of(seen), BYTES, 5), recorded);
    next->deleter(next);
    block = block_new(BYTES, theirs);
    CHECK(data_of(block) == memory); /* by now, in either case */
    block->deleter(block);
    seen->deleter(seen);
    end(recorded ? 0 : 1);
}

static void test_blocks_used_on_other_streams(void) { check_used_elsewhere(false); }

static void test_blocks_recorded_on_other_streams(void) { check_used_elsewhere(true); }

/* Its own stream's reads are still to come when a block is freed, and come before its next use. */
static void test_blocks_read_later_on_their_stream(void) {
    begin();
    uintptr_t theirs = FAKE(fake_stream)(0), other = FAKE(fake_stream)(0);
    dl_managed *block = block_new(BYTES, theirs), *seen = block_new(BYTES, other), *next;
    void *memory = data_of(block);
    FAKE(fake_quarantine)(0);
    CHECK_EQ(FAKE(fake_synchronize)(0, theirs), 0);
    CHECK_EQ(FAKE(fake_synchronize)(0, other), 0);
    memset(memory, 5, BYTES);
    CHECK_EQ(copy_late(data_of(seen), memory, theirs), 0);
    block->deleter(block);
    CHECK(!all(data_of(seen), BYTES, 5));
    next = block_new(BYTES, theirs);
    CHECK(data_of(next) == memory);
    CHECK_EQ(FAKE(fake_synchronize)(0, theirs), 0);
    CHECK(all(data_of(seen), BYTES, 5));
    CHECK(all(memory, BYTES, FAKE_LATE));
    next->deleter(next);
    seen->deleter(seen);
    end(0);
}

/* Bytes of a 6 x 5 matrix: every second column, transposed. */
static void test_strided_copies(void) {
    begin();
    uintptr_t theirs = FAKE(fake_stream)(0);
    dl_managed *block = block_new(30, theirs), *copied = block_new(18, theirs);
    unsigned char *from = data_of(block), *to = data_of(copied);
    int64_t shape[] = {3, 6}, strides[] = {2, 5};
    CHECK_EQ(
        FAKE(fake_copy_strided)((uintptr_t)to, (uintptr_t)from, 2, shape, strides, 1, 0, theirs),
        0);
    FAKE(fake_drain)();
    for (unsigned char i = 0; i < 30; i++) from[i] = i;
    CHECK_EQ(
        FAKE(fake_copy_strided)((uintptr_t)to, (uintptr_t)from, 2, shape, strides, 1, 0, theirs),
        0);
    CHECK(to[1] == FAKE_LATE);
    CHECK_EQ(FAKE(fake_synchronize)(0, theirs), 0);
    for (int column = 0; column < 3; column++)
        for (int row = 0; row < 6; row++) CHECK_EQ(to[column * 6 + row], row * 5 + column * 2);
    block->deleter(block);
    copied->deleter(copied);
    end(0);
}

static void test_noted_memory(void) {
    begin();
    uintptr_t stream = stream_new(), theirs = FAKE(fake_stream)(0);
    unsigned char *memory = calloc(1, BYTES);
    MUST(memory != NULL);
    CHECK_EQ(FAKE(fake_note)(memory, BYTES, 0, theirs), 0);
    copy_in((uintptr_t)memory, slot, stream);
    FAKE(fake_drain)();
    CHECK(all(memory, BYTES, FAKE_LATE));
    CHECK_EQ(FAKE(fake_forget)(memory), 0);
    CHECK_EQ(FAKE(fake_forget)(memory), 1);
    BITES(CHECK_EQ(FAKE(cuMemcpyHtoDAsync_v2)((uintptr_t)memory, slot, BYTES, stream), 1));
    free(memory);
    end(1);
}

static void test_live_counts(void) {
    fake_counts live;
    begin();
    uintptr_t stream = stream_new(), event = event_new(), memory = alloc(BYTES);
    dl_managed *block = block_new(BYTES, FAKE(fake_stream)(0));
    FAKE(fake_live)(&live);
    CHECK(live.contexts == 1 && live.streams == 1 && live.events == 1 && live.ranges == 2);
    CHECK(live.range_bytes == 2 * BYTES && live.blocks == 2 && live.block_bytes == 2 * BYTES);
    block->deleter(block);
    CHECK_EQ(FAKE(cuEventDestroy_v2)(event), 0);
    CHECK_EQ(FAKE(cuStreamDestroy_v2)(stream), 0);
    CHECK_EQ(FAKE(cuMemFree_v2)(memory), 0);
    FAKE(fake_clear)();
    FAKE(fake_live)(&live);
    CHECK(live.contexts == 1 && live.streams == 0 && live.events == 0 && live.blocks == 0);
    CHECK_EQ(FAKE(fake_current_depth)(), 1);
    end(0);
}

int main(void) {
    FAKE(fake_reset)(); /* opened before descriptors are counted */
    RUN(test_blocks_have_work_pending);
    RUN(test_blocks_freed_too_early);
    RUN(test_blocks_are_reused);
    RUN(test_blocks_are_reused_on_their_stream);
    RUN(test_blocks_used_on_other_streams);
    RUN(test_blocks_recorded_on_other_streams);
    RUN(test_blocks_read_later_on_their_stream);
    RUN(test_strided_copies);
    RUN(test_noted_memory);
    RUN(test_live_counts);
    return test_result();
}
