/* fuzz_header.c - mutated headers: whatever is accepted must be consistent in itself, and
 * nothing may be read or written out of bounds (which ASan and UBSan see).
 *
 * fuzz_header [iterations [seed]]: the same mutations every time. Built with -DFST_LIBFUZZER
 * -fsanitize=fuzzer it is a libFuzzer target; the first two bytes are the length of the data.
 */
#include "test.h"

#include "file/fst_header.h"
#include "tensor/fst_batch.h"

static void check_tensor(const fst_layout_view *view, const fst_tensor *tensor) {
    static const unsigned bits[FST_DTYPES] = {8,  4,  6,  6,  8,  8,  8,  8,  8,  8,  8,
                                              16, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64};
    MUST(tensor->dtype < FST_DTYPES && tensor->ndim <= 64);
    MUST(tensor->dims_index <= view->dims_count &&
         tensor->ndim <= view->dims_count - tensor->dims_index);
    MUST(view->dtypes >> tensor->dtype & 1u);
    uint64_t elements = 1;
    for (uint32_t i = 0; i < tensor->ndim; i++) {
        int64_t dim = view->dims[tensor->dims_index + i];
        MUST(dim >= 0 && !__builtin_mul_overflow(elements, (uint64_t)dim, &elements));
    }
    MUST((tensor->end - tensor->begin) * 8 == elements * bits[tensor->dtype]);
}

/* Describing the tensors for torch computes strides, which must not overflow. */
static void check_batch(const fst_layout_view *view, uint64_t data) {
    static fst_dl_dtype table[FST_DTYPES];
    fst_arena *arena = NULL;
    fst_batch *batch = NULL;
    fst_error err = {0};
    if (view->count == 0) return;
    for (int i = 0; i < FST_DTYPES; i++) table[i] = (fst_dl_dtype){1, 8, 0, 1};
    MUST(fst_arena_borrow(table, data, &arena, &err) == FST_OK); /* never looked into */
    MUST(fst_batch_create(arena, view, NULL, view->count, NULL, 0, table, &batch, &err) == FST_OK);
    fst_batch_drop(batch, view->count + 1);
    fst_arena_release(&arena);
}

static bool check_one(const char *header, size_t bytes, uint64_t data) {
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    int code = fst_layout_parse(header, bytes, 8 + bytes + data, &layout, &view, &err);
    if (code != FST_OK) {
        MUST(code == FST_FALLBACK && layout == NULL && err.message[0] != '\0');
        return false;
    }
    uint64_t at = 0, names = 0;
    for (uint64_t i = 0; i < view.count; i++) {
        MUST(view.tensors[i].begin == at && view.tensors[i].end >= at);
        at = view.tensors[i].end;
        check_tensor(&view, &view.tensors[i]);
    }
    MUST(at == data && view.data_begin == 8 + bytes);
    for (uint64_t i = 0; i < view.names_bytes; i++) names += view.names[i] == '\0';
    MUST(names == view.count && (names == 0 || view.names[view.names_bytes - 1] == '\0'));
    if (view.metadata != NULL)
        MUST(view.metadata_bytes >= 2 && view.metadata[0] == '{' &&
             view.metadata[view.metadata_bytes - 1] == '}');
    check_batch(&view, data);
    fst_layout_release(&layout);
    return true;
}

#ifdef FST_LIBFUZZER

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes) {
    if (bytes < 2) return 0;
    (void)check_one((const char *)input + 2, bytes - 2,
                    (uint64_t)input[0] | (uint64_t)input[1] << 8);
    return 0;
}

#else

static const char *const seeds[] = {
    "{}",
    "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}   ",
    "{\"__metadata__\":{\"format\":\"pt\",\"\\u00e9\":\"\\ud83e\\udd99\"},"
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[4,16]},"
    "\"a\":{\"dtype\":\"I32\",\"shape\":[],\"data_offsets\":[0,4]}}",
    "{\"x\":{\"shape\":[0,4],\"data_offsets\":[0,0],\"dtype\":\"U8\"},"
    "\"y\":{\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[0,2]},"
    "\"z\\n\":{\"dtype\":\"F6_E2M3\",\"shape\":[2,2],\"data_offsets\":[2,5]}}",
};

/* clang-format off */
static const char *const tokens[] = {
    "{", "}", "[", "]", ",", ":", "\"", "\\", "\\u0000", "\\u0041", "\\ud800", "\\udc00", "\\n", "0",
    "1", "2", "4", "-1", "1.5", "1e9", "18446744073709551615", "18446744073709551616",
    "9223372036854775807", "4611686018427387904", "4294967296", "null", "\"dtype\"", "\"shape\"",
    "\"data_offsets\"", "\"__metadata__\"", "\"F4\"", "\"U8\"", "\"C64\"", "[0,0]", "[0,4]", "{}",
    "\xc3\xa9", "\xff", "\x01", " ", "\n",
};

/* clang-format on */

#define COUNT(array) (sizeof(array) / sizeof *(array))

enum {
    ROOM = 1024
};

/* Replaces `cut` bytes at a place by `text`. */
static size_t replace(char *header, size_t bytes, size_t at, size_t cut, const char *text,
                      size_t text_bytes) {
    if (cut > bytes - at) cut = bytes - at;
    if (bytes - cut + text_bytes > ROOM) return bytes;
    memmove(header + at + text_bytes, header + at + cut, bytes - at - cut);
    memcpy(header + at, text, text_bytes);
    return bytes - cut + text_bytes;
}

static size_t mutate(char *header, size_t bytes, uint64_t *random) {
    char copy[64];
    size_t at = test_below(random, bytes + 1), cut = test_below(random, 6);
    const char *token = tokens[test_below(random, COUNT(tokens))];
    switch (test_below(random, 5)) {
    case 0:
        return replace(header, bytes, at, 0, token, strlen(token));
    case 1:
        return replace(header, bytes, at, cut, "", 0);
    case 2:
        return replace(header, bytes, at, cut, token, strlen(token));
    case 3:
        if (at < bytes) header[at] = (char)(header[at] ^ 1 << test_below(random, 8));
        return bytes;
    default:
        cut = test_below(random, sizeof copy);
        if (cut > bytes - at) cut = bytes - at;
        memcpy(copy, header + at, cut);
        return replace(header, bytes, test_below(random, bytes + 1), 0, copy, cut);
    }
}

int main(int argc, char **argv) {
    uint64_t iterations = argc > 1 ? strtoull(argv[1], NULL, 10) : 100000;
    uint64_t random = argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 20240517, accepted = 0;
    static const uint64_t data[COUNT(seeds)] = {0, 4, 16, 5};
    test_case = "fuzz";
    (void)alarm(WATCHDOG_SECONDS);
    for (uint64_t i = 0; i < iterations; i++) {
        size_t seed = test_below(&random, COUNT(seeds)), bytes = strlen(seeds[seed]);
        char buffer[ROOM];
        memcpy(buffer, seeds[seed], bytes);
        for (uint64_t n = test_below(&random, 4); n > 0; n--)
            bytes = mutate(buffer, bytes, &random);
        char *exact = malloc(bytes == 0 ? 1 : bytes); /* so that ASan sees its end */
        MUST(exact != NULL);
        memcpy(exact, buffer, bytes);
        accepted += check_one(exact, bytes, data[seed] + (test_below(&random, 8) == 0));
        free(exact);
    }
    CHECK(accepted > iterations / 20 && accepted < iterations); /* the mutations are of use */
    test_nothing_left(test_descriptors());
    return test_result();
}

#endif
