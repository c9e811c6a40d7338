/* test_header.c - which headers are accepted, and what is made of them. */
#include "test.h"

#define TEXT(literal) (literal), sizeof(literal) - 1
#define A "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"
#define ONE(dtype, shape, offsets)                                                                 \
    "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
#define F32(shape, offsets) ONE("\"F32\"", shape, offsets)
#define NAMED(name) "{\"" name "\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"
#define META(value) "{\"__metadata__\":" value "}"
#define NINES "99999999999999999999"

typedef struct header_case {
    const char *what;
    const char *header;
    size_t bytes;
    uint64_t data;
} header_case;

/* clang-format off: tables */
static const header_case accepted[] = {
    {"no tensor", TEXT("{}"), 0},
    {"no tensor, spaces", TEXT(" \t\r\n{ \n} \t"), 0},
    {"one", TEXT(A), 4},
    {"spaces everywhere",
     TEXT(" { \"a\" :\t{ \"dtype\" : \"F32\" ,\n\"shape\" : [ 1 ] , \"data_offsets\" : [ 0 , 4 "
          "]\r} } "),
     4},
    {"fields in another order",
     TEXT("{\"a\":{\"data_offsets\":[0,4],\"shape\":[1],\"dtype\":\"F32\"}}"), 4},
    {"scalar", TEXT(F32("[]", "[0,4]")), 4},
    {"empty shape with a space", TEXT(F32("[ ]", "[0,4]")), 4},
    {"zero elements", TEXT(F32("[0]", "[0,0]")), 0},
    {"zero elements, large other dimensions", TEXT(F32("[0,4294967296,1073741824]", "[0,0]")), 0},
    {"empty name", TEXT(NAMED("")), 4},
    {"simple escapes", TEXT(NAMED("\\\"\\\\\\/\\b\\f\\n\\r\\t")), 4},
    {"\\u escapes of 1, 2 and 3 bytes", TEXT(NAMED("\\u0041\\u00E9\\u20ac")), 4},
    {"surrogate pair", TEXT(NAMED("\\ud83e\\uDD99")), 4},
    {"last code point, escaped", TEXT(NAMED("\\udbff\\udfff")), 4},
    {"UTF-8 of 2, 3 and 4 bytes", TEXT(NAMED("\xc3\xa9\xe2\x82\xac\xf0\x9f\xa6\x99")), 4},
    {"UTF-8 at its limits",
     TEXT(NAMED("\xc2\x80\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xf0\x90\x80\x80\xf4\x8f\xbf\xbf")),
     4},
    {"DEL in a name", TEXT(NAMED("\x7f")), 4},
    {"F4, two in a byte", TEXT(ONE("\"F4\"", "[4]", "[0,2]")), 2},
    {"F6, four in three bytes", TEXT(ONE("\"F6_E2M3\"", "[4]", "[0,3]")), 3},
    {"metadata", TEXT(META("{\"format\":\"pt\",\"\\u0061\":\"\"}")), 0},
    {"metadata, empty", TEXT(META("{ }")), 0},
    {"metadata is null", TEXT(META("null")), 0},
    {"metadata is null, spaces", TEXT(META(" null ")), 0},
    {"metadata under an escaped name", TEXT("{\"\\u005f_metadata__\":{\"a\":\"b\"}}"), 0},
    {"metadata last",
     TEXT("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\"__metadata__\":{}}"),
     0},
    {"unsorted offsets",
     TEXT("{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[3,5]},"
          "\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}"),
     5},
    {"largest dimension", TEXT(F32("[9223372036854775807,0]", "[0,0]")), 0},
};

static const header_case rejected[] = {
    {"nothing", TEXT(""), 0},
    {"spaces only", TEXT("   "), 0},
    {"not an object", TEXT("[]"), 0},
    {"not closed", TEXT("{"), 0},
    {"text behind", TEXT("{}x"), 0},
    {"NUL behind", TEXT("{}\0"), 0},
    {"form feed behind", TEXT("{}\f"), 0},
    {"byte order mark", TEXT("\xef\xbb\xbf{}"), 0},
    {"trailing comma", TEXT("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},}"),
     4},
    {"two objects", TEXT("{}{}"), 0},
    {"single quotes", TEXT("{'a':1}"), 0},
    {"member without a value", TEXT("{\"a\"}"), 0},
    {"tensor is null", TEXT("{\"a\":null}"), 0},
    {"tensor is an array", TEXT("{\"a\":[\"F32\",[1],[0,4]]}"), 4},
    {"tensor is empty", TEXT("{\"a\":{}}"), 0},
    {"field missing", TEXT("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}"), 4},
    {"dtype twice",
     TEXT("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"), 4},
    {"shape twice",
     TEXT("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,4]}}"), 4},
    {"offsets twice",
     TEXT(
         "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"data_offsets\":[0,4]}}"),
     4},
    {"unknown field",
     TEXT("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":{}}}"), 4},
    {"unknown dtype", TEXT(ONE("\"F33\"", "[1]", "[0,4]")), 4},
    {"dtype in small letters", TEXT(ONE("\"f32\"", "[1]", "[0,4]")), 4},
    {"dtype with an escape", TEXT(ONE("\"\\u004632\"", "[1]", "[0,4]")), 4},
    {"dtype is a number", TEXT(ONE("32", "[1]", "[0,4]")), 4},
    {"negative dimension", TEXT(F32("[-1]", "[0,4]")), 4},
    {"negative zero", TEXT(F32("[-0]", "[0,0]")), 0},
    {"plus sign", TEXT(F32("[+1]", "[0,4]")), 4},
    {"fraction", TEXT(F32("[1.0]", "[0,4]")), 4},
    {"exponent", TEXT(F32("[1e0]", "[0,4]")), 4},
    {"leading zero", TEXT(F32("[01]", "[0,4]")), 4},
    {"dimension is a string", TEXT(F32("[\"1\"]", "[0,4]")), 4},
    {"dimension is empty", TEXT(F32("[,]", "[0,4]")), 4},
    {"shape is a number", TEXT(F32("1", "[0,4]")), 4},
    {"dimension of 2**63", TEXT(F32("[9223372036854775808,0]", "[0,0]")), 0},
    {"dimension beyond 64 bits", TEXT(F32("[" NINES ",0]", "[0,0]")), 0},
    {"product overflows", TEXT(F32("[4294967296,4294967296]", "[0,0]")), 0},
    {"product overflows before a zero", TEXT(F32("[4294967296,4294967296,0]", "[0,0]")), 0},
    {"bits overflow", TEXT(F32("[2305843009213693952]", "[0,0]")), 0},
    {"strides overflow", TEXT(F32("[0,4611686018427387904,4611686018427387904]", "[0,0]")), 0},
    {"one offset", TEXT(F32("[1]", "[0]")), 4},
    {"three offsets", TEXT(F32("[1]", "[0,4,8]")), 4},
    {"negative offset", TEXT(F32("[1]", "[-4,0]")), 4},
    {"offsets backwards", TEXT(F32("[1]", "[4,0]")), 4},
    {"offset beyond 64 bits", TEXT(F32("[1]", "[0," NINES "]")), 4},
    {"does not begin at 0", TEXT(F32("[1]", "[4,8]")), 8},
    {"hole",
     TEXT("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
          "\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]}}"),
     3},
    {"overlap",
     TEXT("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
          "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}"),
     3},
    {"data too short", TEXT(A), 3},
    {"data too long", TEXT(A), 5},
    {"data without tensors", TEXT("{}"), 1},
    {"shape and offsets disagree", TEXT(F32("[2]", "[0,4]")), 4},
    {"half a byte", TEXT(ONE("\"F4\"", "[1]", "[0,0]")), 0},
    {"NUL in a name", TEXT(NAMED("\\u0000")), 4},
    {"raw NUL in a name", TEXT("{\"\0\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"),
     4},
    {"newline in a name", TEXT(NAMED("\n")), 4},
    {"unknown escape", TEXT(NAMED("\\x41")), 4},
    {"escaped quote only", TEXT("{\"\\"), 0},
    {"short \\u", TEXT(NAMED("\\u12")), 4},
    {"\\u at the end", TEXT("{\"\\u00"), 0},
    {"not hexadecimal", TEXT(NAMED("\\u00g0")), 4},
    {"lone leading surrogate", TEXT(NAMED("\\ud800")), 4},
    {"leading surrogate, then a letter", TEXT(NAMED("\\ud800\\u0041")), 4},
    {"two leading surrogates", TEXT(NAMED("\\ud800\\ud800")), 4},
    {"lone trailing surrogate", TEXT(NAMED("\\udc00")), 4},
    {"half a pair at the end", TEXT("{\"\\ud83e\\u"), 0},
    {"stray continuation byte", TEXT(NAMED("\x80")), 4},
    {"overlong 2", TEXT(NAMED("\xc0\xaf")), 4},
    {"overlong 3", TEXT(NAMED("\xe0\x9f\xbf")), 4},
    {"overlong 4", TEXT(NAMED("\xf0\x8f\xbf\xbf")), 4},
    {"surrogate in UTF-8", TEXT(NAMED("\xed\xa0\x80")), 4},
    {"beyond Unicode", TEXT(NAMED("\xf4\x90\x80\x80")), 4},
    {"five-byte UTF-8", TEXT(NAMED("\xf8\x88\x80\x80\x80")), 4},
    {"cut UTF-8", TEXT("{}\xe2\x82"), 0},
    {"metadata is almost null", TEXT(META("nullx")), 0},
    {"metadata is half of null", TEXT("{\"__metadata__\":nu"), 0},
    {"metadata twice, once null", TEXT("{\"__metadata__\":null,\"__metadata__\":{}}"), 0},
    {"metadata is a string", TEXT(META("\"a\"")), 0},
    {"metadata value is a number", TEXT(META("{\"a\":1}")), 0},
    {"metadata value is an object", TEXT(META("{\"a\":{}}")), 0},
    {"metadata twice", TEXT("{\"__metadata__\":{},\"__metadata__\":{}}"), 0},
    {"metadata not closed", TEXT("{\"__metadata__\":{\"a\":\"b\""), 0},
    {"deep", TEXT("{\"a\":[[[[[[[[[[[[[[[[[[[[[["), 0},
};

/* clang-format on */

static int parse(const char *header, size_t bytes, uint64_t data, fst_layout **out,
                 fst_layout_view *view, fst_error *err) {
    /* At its exact size on the heap: a read behind it shows under ASan. */
    char *copy = malloc(bytes == 0 ? 1 : bytes);
    MUST(copy != NULL);
    memcpy(copy, header, bytes);
    int code = fst_layout_parse(copy, bytes, 8 + bytes + data, out, view, err);
    free(copy);
    return code;
}

static void check_table(const header_case *cases, size_t count, int expected) {
    for (size_t i = 0; i < count; i++) {
        fst_layout *layout = NULL;
        fst_layout_view view;
        fst_error err = {0};
        test_case = cases[i].what;
        int code = parse(cases[i].header, cases[i].bytes, cases[i].data, &layout, &view, &err);
        if (!CHECK_EQ(code, expected)) (void)fprintf(stderr, "  %s\n", err.message);
        CHECK((layout != NULL) == (code == FST_OK));
        if (code != FST_OK) CHECK(err.code == code && err.message[0] != '\0');
        fst_layout_release(&layout);
    }
}

static void test_accepted(void) {
    check_table(accepted, sizeof accepted / sizeof *accepted, FST_OK);
}

static void test_doubted(void) {
    check_table(rejected, sizeof rejected / sizeof *rejected, FST_FALLBACK);
}

/* Every beginning of a valid header is invalid, and reading it stays inside it. */
static void test_prefixes(void) {
    for (size_t i = 0; i < sizeof accepted / sizeof *accepted; i++) {
        size_t whole = accepted[i].bytes;
        while (whole > 0 && accepted[i].header[whole - 1] != '}') whole--;
        for (size_t bytes = 0; bytes < whole; bytes++) {
            fst_layout *layout = NULL;
            fst_layout_view view;
            fst_error err = {0};
            test_case = accepted[i].what;
            CHECK_EQ(parse(accepted[i].header, bytes, accepted[i].data, &layout, &view, &err),
                     FST_FALLBACK);
            fst_layout_release(&layout);
        }
    }
}

static void test_contents(void) {
    static const char header[] =
        "{\"w\\u00e9\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[4,16]},"
        "\"__metadata__\": {\"format\":\"pt\"} ,"
        "\"z\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
        "\"e\":{\"dtype\":\"I64\",\"shape\":[7,0],\"data_offsets\":[4,4]}}";
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    MUST(parse(TEXT(header), 16, &layout, &view, &err) == FST_OK);
    CHECK_EQ(view.count, 3);
    CHECK_EQ(view.data_begin, 8 + sizeof header - 1);
    /* By begin, then end: the empty one comes before the one that begins where it does. */
    CHECK(view.names_bytes == 8 && memcmp(view.names, "z\0e\0w\xc3\xa9\0", 8) == 0);
    CHECK(view.tensors[0].dtype == FST_F32 && view.tensors[0].ndim == 0);
    CHECK(view.tensors[1].dtype == FST_I64 && view.tensors[1].begin == 4 &&
          view.tensors[1].end == 4);
    const fst_tensor *w = &view.tensors[2];
    CHECK(w->dtype == FST_BF16 && w->begin == 4 && w->end == 16 && w->ndim == 2);
    CHECK(view.dims[w->dims_index] == 2 && view.dims[w->dims_index + 1] == 3);
    CHECK_EQ(view.dims_count, 4);
    CHECK_EQ(view.dtypes, 1u << FST_F32 | 1u << FST_I64 | 1u << FST_BF16);
    CHECK(view.metadata_bytes == 15 && memcmp(view.metadata, "{\"format\":\"pt\"}", 15) == 0);
    CHECK_EQ(view.odd_f4, 0);
    fst_layout_release(&layout);
    CHECK(layout == NULL);
    fst_layout_release(&layout);
}

static void check_odd_f4(const char *header, size_t bytes, uint64_t data, uint32_t odd) {
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    if (CHECK_EQ(parse(header, bytes, data, &layout, &view, &err), FST_OK))
        CHECK_EQ(view.odd_f4, odd);
    fst_layout_release(&layout);
}

static void test_odd_f4(void) {
    check_odd_f4(TEXT(ONE("\"F4\"", "[3,2]", "[0,3]")), 3, 0);
    check_odd_f4(TEXT(ONE("\"F4\"", "[2,3]", "[0,3]")), 3, 1);
}

/* All 22 dtypes by name, and their sizes. */
static void test_dtypes(void) {
    static const struct {
        const char *name;
        unsigned bits;
        unsigned dtype;
    } all[] = {
        /* clang-format off */
        {"BOOL", 8, FST_BOOL}, {"F4", 4, FST_F4}, {"F6_E2M3", 6, FST_F6_E2M3},
        {"F6_E3M2", 6, FST_F6_E3M2}, {"U8", 8, FST_U8}, {"I8", 8, FST_I8},
        {"F8_E5M2", 8, FST_F8_E5M2}, {"F8_E4M3", 8, FST_F8_E4M3}, {"F8_E8M0", 8, FST_F8_E8M0},
        {"F8_E4M3FNUZ", 8, FST_F8_E4M3FNUZ}, {"F8_E5M2FNUZ", 8, FST_F8_E5M2FNUZ},
        {"I16", 16, FST_I16}, {"U16", 16, FST_U16}, {"F16", 16, FST_F16}, {"BF16", 16, FST_BF16},
        {"I32", 32, FST_I32}, {"U32", 32, FST_U32}, {"F32", 32, FST_F32}, {"C64", 64, FST_C64},
        {"F64", 64, FST_F64}, {"I64", 64, FST_I64}, {"U64", 64, FST_U64},
        /* clang-format on */
    };
    CHECK_EQ(sizeof all / sizeof *all, FST_DTYPES);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char header[200];
        fst_layout *layout = NULL;
        fst_layout_view view;
        fst_error err = {0};
        test_case = all[i].name;
        int bytes = snprintf(header, sizeof header,
                             "{\"a\":{\"dtype\":\"%s\",\"shape\":[4,2],\"data_offsets\":[0,%u]}}",
                             all[i].name, all[i].bits);
        if (CHECK_EQ(parse(header, (size_t)bytes, all[i].bits, &layout, &view, &err), FST_OK))
            CHECK_EQ(view.tensors[0].dtype, all[i].dtype);
        fst_layout_release(&layout);
    }
}

/* 64 dimensions are taken, 65 are stock's to judge. */
static void test_dimensions(void) {
    for (int n = 63; n <= 66; n++) {
        char header[400] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[1";
        fst_layout *layout = NULL;
        fst_layout_view view;
        fst_error err = {0};
        for (int i = 1; i < n; i++) strcat(header, ",1");
        strcat(header, "],\"data_offsets\":[0,1]}}");
        CHECK_EQ(parse(header, strlen(header), 1, &layout, &view, &err),
                 n <= 64 ? FST_OK : FST_FALLBACK);
        fst_layout_release(&layout);
    }
}

/* 20,000 tensors in reverse order: arrays grow many times, sorting has work to do. */
static void test_many(void) {
    enum {
        MANY = 20000
    };
    size_t room = MANY * 80, bytes = 1;
    char *header = malloc(room);
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    MUST(header != NULL);
    header[0] = '{';
    for (int i = MANY - 1; i >= 0; i--)
        bytes += (size_t)snprintf(
            header + bytes, room - bytes,
            "\"t.%d\":{\"dtype\":\"U8\",\"shape\":[1,3],\"data_offsets\":[%d,%d]}%s", i, 3 * i,
            3 * i + 3, i == 0 ? "}" : ",");
    MUST(parse(header, bytes, 3 * MANY, &layout, &view, &err) == FST_OK);
    CHECK_EQ(view.count, MANY);
    const char *name = view.names;
    for (int i = 0; i < MANY; i++) {
        char expected[32];
        (void)snprintf(expected, sizeof expected, "t.%d", i);
        CHECK(strcmp(name, expected) == 0 && view.tensors[i].begin == 3 * (uint64_t)i);
        CHECK_EQ(view.dims[view.tensors[i].dims_index + 1], 3);
        name += strlen(name) + 1;
    }
    CHECK(name == view.names + view.names_bytes);
    fst_layout_release(&layout);
    free(header);
}

static void test_lengths(void) {
    fst_layout *layout = NULL;
    fst_layout_view view;
    fst_error err = {0};
    CHECK_EQ(fst_layout_parse("{}", 2, 9, &layout, &view, &err), FST_FALLBACK);
    CHECK_EQ(fst_layout_parse("{}", 100000001, UINT64_MAX, &layout, &view, &err), FST_FALLBACK);
    CHECK_EQ(fst_layout_parse("{}", UINT64_MAX, UINT64_MAX, &layout, &view, &err), FST_FALLBACK);
    CHECK(layout == NULL);
}

/* ---- headers in files ---- */

#define FIRST_READ (16u << 10) /* at most: a longer header takes another */

static test_file file_with_header(const char *header, uint64_t length, const char *data) {
    static unsigned char content[2 * FIRST_READ + 512];
    size_t header_bytes = strlen(header), data_bytes = strlen(data);
    for (unsigned i = 0; i < 8; i++) content[i] = (unsigned char)(length >> 8 * i);
    memcpy(content + 8, header, header_bytes);
    memcpy(content + 8 + header_bytes, data, data_bytes);
    return test_create_text(content, 8 + header_bytes + data_bytes);
}

static int read_header(test_file *made, fst_layout *cached, fst_layout **out) {
    fst_layout_view view;
    fst_error err = {0};
    fst_file *file = test_open(made);
    int code = fst_layout_read(file, cached, out, &view, &err);
    fst_file_release(&file);
    return code;
}

static void test_read(void) {
    test_file good = file_with_header(A, sizeof A - 1, "1234");
    test_file other = file_with_header(NAMED("b"), sizeof A - 1, "1234");
    fst_layout *layout = NULL, *again = NULL;
    CHECK_EQ(read_header(&good, NULL, &layout), FST_OK);
    MUST(layout != NULL);
    CHECK_EQ(read_header(&good, layout, &again), FST_PENDING);
    CHECK(again == NULL);
    CHECK_EQ(read_header(&other, layout, &again), FST_OK); /* as long, but another */
    CHECK(again != NULL);
    fst_layout_release(&again);
    fst_layout_release(&layout);
    test_remove(&good);
    test_remove(&other);
}

static void test_read_bad(void) {
    static const struct {
        uint64_t length;
        const char *data;
    } bad[] = {{0, ""}, {1, ""}, {100, ""}, {UINT64_MAX, ""}, {INT64_MAX, ""}, {sizeof A - 1, ""}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        test_file made = file_with_header(A, bad[i].length, bad[i].data);
        fst_layout *layout = NULL;
        CHECK_EQ(read_header(&made, NULL, &layout), FST_FALLBACK);
        CHECK(layout == NULL);
        test_remove(&made);
    }
    for (size_t bytes = 0; bytes < 8; bytes++) { /* no room for the length */
        test_file made = test_create_text("\2\0\0\0\0\0\0\0", bytes);
        fst_layout *layout = NULL;
        CHECK_EQ(read_header(&made, NULL, &layout), FST_FALLBACK);
        test_remove(&made);
    }
}

static void test_read_faults(void) {
    test_file made = file_with_header(A, sizeof A - 1, "1234");
    fst_layout *layout = NULL;
    fst_file *file = test_open(&made);
    fst_layout_view view;
    fst_error err = {0};
    CHECK_EQ(fst_fault_set("pread", 1, UINT64_MAX, 0, 3), 0); /* three bytes at a time */
    CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), FST_OK);
    fst_layout_release(&layout);
    CHECK_EQ(fst_fault_set("pread", 1, 5, EINTR, 0), 0);
    CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), FST_OK);
    fst_layout_release(&layout);
    CHECK_EQ(fst_fault_set("pread", 1, 1, EIO, 0), 0);
    CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), FST_E_SYS);
    CHECK(err.sys_errno == EIO && strstr(err.message, made.path) != NULL && layout == NULL);
    fst_fault_clear();
    CHECK_EQ(fst_fault_set("fadvise", 1, UINT64_MAX, ESPIPE, 0), 0); /* advice only */
    CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), FST_OK);
    fst_layout_release(&layout);
    layout = NULL;
    fst_fault_clear();
    MUST(truncate(made.path, 20) == 0); /* shorter than when it was opened */
    CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), FST_FALLBACK);
    MUST(truncate(made.path, 4) == 0);
    CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), FST_FALLBACK);
    CHECK(layout == NULL);
    fst_file_release(&file);
    test_remove(&made);
}

/* Headers as long as the first read, and a little shorter and longer. */
static void test_read_long(void) {
    static char header[2 * FIRST_READ];
    for (size_t bytes = FIRST_READ - 16; bytes < FIRST_READ + 8; bytes++) {
        (void)snprintf(header, sizeof header, "%-*s", (int)bytes, A); /* spaces behind */
        test_file made = file_with_header(header, bytes, "1234");
        fst_layout *layout = NULL;
        fst_layout_view view;
        fst_error err = {0};
        fst_file *file = test_open(&made);
        CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), FST_OK);
        CHECK(view.count == 1 && view.data_begin == 8 + bytes);
        fst_layout_release(&layout);
        layout = NULL;
        bool second = bytes + 8 > FIRST_READ;
        CHECK_EQ(fst_fault_set("pread", 2, 1, EIO, 0), 0);
        CHECK_EQ(fst_layout_read(file, NULL, &layout, &view, &err), second ? FST_E_SYS : FST_OK);
        fst_layout_release(&layout);
        fst_fault_clear();
        fst_file_release(&file);
        test_remove(&made);
    }
}

int main(void) {
    RUN(test_accepted);
    RUN(test_doubted);
    RUN(test_prefixes);
    RUN(test_contents);
    RUN(test_odd_f4);
    RUN(test_dtypes);
    RUN(test_dimensions);
    RUN(test_many);
    RUN(test_lengths);
    RUN(test_read);
    RUN(test_read_bad);
    RUN(test_read_faults);
    RUN(test_read_long);
    return test_result();
}
