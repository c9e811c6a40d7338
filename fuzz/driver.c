/* driver.c - runs a fuzz target where the compiler has no libFuzzer: blind mutations, the same
 * every time.
 *
 * TARGET [-runs=N] [-max_total_time=SECONDS] [-seed=N] [-dict=FILE] [FILE ...]: as with libFuzzer,
 * but each line of a file is an input to begin with. A file of tokens has one a line, "in quotes",
 * with the escapes \\, \" and \xNN.
 */
#include "fuzz.h"
#include "test.h"

#include <time.h>

enum {
    ROOM = 4096,  /* of an input */
    LINES = 1024, /* of all files */
    LINE = 2048
};

typedef struct text {
    char *bytes;
    size_t count;
} text;

typedef struct texts {
    text all[LINES];
    size_t count;
} texts;

static texts inputs, tokens;

/* ---- files ---- */

static void add(texts *to, const char *bytes, size_t count) {
    MUST(to->count < LINES);
    text *one = &to->all[to->count++];
    one->bytes = malloc(count == 0 ? 1 : count);
    MUST(one->bytes != NULL);
    memcpy(one->bytes, bytes, count);
    one->count = count;
}

static void add_token(const char *line) {
    char token[LINE];
    size_t count = 0;
    for (const char *at = line + 1; *at != '"' && *at != '\0'; at++) {
        unsigned byte = (unsigned char)*at;
        if (byte == '\\' && at[1] == 'x') {
            MUST(sscanf(at + 2, "%2x", &byte) == 1);
            at += 3;
        } else if (byte == '\\') {
            byte = (unsigned char)*++at;
        }
        token[count++] = (char)byte;
    }
    add(&tokens, token, count);
}

static void read_lines(const char *path, bool of_tokens) {
    char line[LINE];
    FILE *file = fopen(path, "re");
    MUST(file != NULL);
    while (fgets(line, sizeof line, file) != NULL) {
        size_t count = strcspn(line, "\n");
        line[count] = '\0';
        if (!of_tokens)
            add(&inputs, line, count);
        else if (line[0] == '"')
            add_token(line);
    }
    (void)fclose(file);
}

/* ---- mutations ---- */

/* Replaces `cut` bytes at a place. */
static size_t replace(char *input, size_t bytes, size_t at, size_t cut, const char *by,
                      size_t by_bytes) {
    if (cut > bytes - at) cut = bytes - at;
    if (bytes - cut + by_bytes > ROOM) return bytes;
    memmove(input + at + by_bytes, input + at + cut, bytes - at - cut);
    memcpy(input + at, by, by_bytes);
    return bytes - cut + by_bytes;
}

static size_t mutate(char *input, size_t bytes, uint64_t *random) {
    char copy[64];
    size_t at = test_below(random, bytes + 1), cut = test_below(random, 6);
    const text none = {copy, 0};
    const text *token = tokens.count == 0 ? &none : &tokens.all[test_below(random, tokens.count)];
    switch (test_below(random, 6)) {
    case 0:
        return replace(input, bytes, at, 0, token->bytes, token->count);
    case 1:
        return replace(input, bytes, at, cut, "", 0);
    case 2:
        return replace(input, bytes, at, cut, token->bytes, token->count);
    case 3:
        if (at < bytes) input[at] = (char)(input[at] ^ 1 << test_below(random, 8));
        return bytes;
    case 4:
        for (size_t i = 0; i < cut; i++) copy[i] = (char)test_random(random);
        return replace(input, bytes, at, test_below(random, 6), copy, cut);
    default:
        cut = test_below(random, sizeof copy);
        if (cut > bytes - at) cut = bytes - at;
        memcpy(copy, input + at, cut);
        return replace(input, bytes, test_below(random, bytes + 1), 0, copy, cut);
    }
}

/* One of the files' inputs; where there is none, any bytes. */
static size_t begin(char *input, uint64_t *random) {
    if (inputs.count == 0) {
        size_t bytes = test_below(random, 128);
        for (size_t i = 0; i < bytes; i++) input[i] = (char)test_random(random);
        return bytes;
    }
    const text *one = &inputs.all[test_below(random, inputs.count)];
    memcpy(input, one->bytes, one->count);
    return one->count;
}

/* In memory of its own, of which a sanitizer sees the end. */
static void run(const char *input, size_t bytes) {
    uint8_t *exact = malloc(bytes == 0 ? 1 : bytes);
    MUST(exact != NULL);
    memcpy(exact, input, bytes);
    (void)LLVMFuzzerTestOneInput(exact, bytes);
    free(exact);
}

static const char *value_of(const char *argument, const char *name) {
    size_t bytes = strlen(name);
    return strncmp(argument, name, bytes) == 0 ? argument + bytes : NULL;
}

int main(int argc, char **argv) {
    uint64_t runs = UINT64_MAX, random = 20240517;
    time_t end = 0; /* none */
    test_case = "fuzz";
    for (int i = 1; i < argc; i++) {
        const char *value;
        if ((value = value_of(argv[i], "-runs=")) != NULL)
            runs = strtoull(value, NULL, 10);
        else if ((value = value_of(argv[i], "-max_total_time=")) != NULL)
            end = time(NULL) + strtol(value, NULL, 10);
        else if ((value = value_of(argv[i], "-seed=")) != NULL)
            random = strtoull(value, NULL, 10) | 1;
        else if ((value = value_of(argv[i], "-dict=")) != NULL)
            read_lines(value, true);
        else
            read_lines(argv[i], false);
    }
    for (size_t i = 0; i < inputs.count; i++) run(inputs.all[i].bytes, inputs.all[i].count);
    for (uint64_t i = 0; i < runs && (end == 0 || i % 256 != 0 || time(NULL) < end); i++) {
        char input[ROOM];
        size_t bytes = begin(input, &random);
        for (uint64_t n = test_below(&random, 4); n > 0; n--) bytes = mutate(input, bytes, &random);
        run(input, bytes);
    }
    MUST(fuzz_summary());
    test_nothing_left(test_descriptors());
    for (size_t i = 0; i < inputs.count; i++) free(inputs.all[i].bytes);
    for (size_t i = 0; i < tokens.count; i++) free(tokens.all[i].bytes);
    return test_result();
}
