#!/bin/sh
# run.sh [variant ...] - builds the engine without Python and runs its C tests.
#
# Variants: address (ASan and UBSan), thread (TSan), none (warnings are errors); all three
# when none is named. Variants run side by side, and the output of each follows when it is done.
# CC chooses the compiler, CFLAGS adds flags, RUNNER is a command before each program, such as an
# emulator's, JOBS is the number of compilers that a variant runs at once, and TMPDIR the folder of
# builds and test files: on a disk, since tmpfs may refuse O_DIRECT.
# With variant none the engine is also built without each of its ordering rules, and that
# rule's cases of test_device_order must fail; and gcc's analyzer must find nothing in the engine.
# Exits with 1 when anything failed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
native=$(dirname "$here")
fuzz=$(dirname "$native")/fuzz
CC=${CC:-cc}
variants=${*:-none address thread}
jobs=${JOBS:-$(nproc 2>/dev/null || echo 2)}
warnings="-Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wformat=2"
passed=0 failed=0
programs="$(cd "$here" && for source in test_*.c; do echo "${source%.c}"; done) fuzz_header fuzz_plan"

on_disk() { [ -d "$1" ] && [ -w "$1" ] && [ "$(stat -f -c %T "$1" 2>/dev/null)" != tmpfs ]; }

if [ -z "${TMPDIR:-}" ]; then
    for TMPDIR in /tmp /var/tmp .; do
        if on_disk "$TMPDIR"; then break; fi
    done
fi
build=$(mktemp -d "$TMPDIR/fst_tests.XXXXXX") || exit 1
pids=
# shellcheck disable=SC2086 # several, or none
trap '[ -z "$pids" ] || kill $pids 2>/dev/null; rm -rf "$build"' EXIT
trap 'exit 1' HUP INT TERM

flags_of() {
    case $1 in
    none) echo "-O2 -Werror" ;;
    address) echo "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" ;;
    thread) echo "-O1 -fno-omit-frame-pointer -fsanitize=thread" ;;
    esac
}

# With some settings of vm.mmap_rnd_bits sanitizers start only without address randomisation.
runner_of() {
    echo 'int main(void) { return 0; }' >"$build/$1.empty.c"
    # shellcheck disable=SC2046 # flags are words
    $CC $(flags_of "$1") "$build/$1.empty.c" -o "$build/$1.empty" 2>"$build/$1.log" || return 1
    for runner in "${RUNNER:-}" "setarch $(uname -m) -R"; do
        if $runner "$build/$1.empty" >"$build/$1.log" 2>&1; then
            echo "$runner"
            return 0
        fi
    done
    return 1
}

# The fake device driver, which programs find through FAKE_CUDA.
build_fake() { # variant
    # shellcheck disable=SC2046,SC2086
    $CC -std=c11 -g -pthread -fPIC -shared -fvisibility=hidden -D_GNU_SOURCE= -D_FILE_OFFSET_BITS=64 $warnings \
        $(flags_of "$1") ${CFLAGS:-} "$here"/fake_*.c -o "$build/$1/libfake_cuda.so"
}

compile() { # variant
    mkdir "$build/$1"
    # shellcheck disable=SC2016 # the inner shell expands it
    find "$native" "$fuzz" -name '*.c' ! -name fst_python.c ! -name 'fake_*.c' ! -name 'preload_*.c' | FLAGS="-std=c11 -g -pthread -D_GNU_SOURCE= -D_FILE_OFFSET_BITS=64 $warnings $(flags_of "$1") ${CFLAGS:-}" \
        CC=$CC OUT="$build/$1" NATIVE=$native \
        xargs -P "$jobs" -I '{}' sh -c '$CC $FLAGS -I"$NATIVE" -I"$NATIVE/tests" -c "$1" -o "$OUT/$(basename "$1" .c).o"' sh '{}' ||
        return 1
    build_fake "$1" || return 1
    for program in $programs; do
        more=
        case $program in
        test_nomem) more=-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc ;;
        fuzz_*) more=$build/$1/driver.o ;;
        esac
        # shellcheck disable=SC2046,SC2086
        $CC -pthread $(flags_of "$1") $more "$build/$1/${program#fuzz_}.o" "$build/$1"/fst_*.o \
            -ldl -o "$build/$1/$program" || return 1
    done
}

run_one() { # variant, program, runner
    arguments=
    case $2:$1 in
    fuzz_header:thread) arguments="-runs=2000 -dict=$fuzz/header.dict $fuzz/header.seeds" ;;
    fuzz_header:*) arguments="-runs=40000 -dict=$fuzz/header.dict $fuzz/header.seeds" ;;
    fuzz_plan:none) arguments=-runs=3000 ;;
    fuzz_plan:thread) arguments=-runs=200 ;;
    fuzz_plan:*) arguments=-runs=1000 ;;
    esac
    # shellcheck disable=SC2086
    TMPDIR=$build FAKE_CUDA=$build/$1/libfake_cuda.so \
        UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=die_after_fork=0:halt_on_error=1 \
        $3 "$build/$1/$2" $arguments >"$build/$1.log" 2>&1
    case $? in
    0) passed=$((passed + 1)) result=ok ;;
    77) result=skipped ;;
    *) failed=$((failed + 1)) result=FAILED ;;
    esac
    printf '%-8s %-8s %s\n' "$1" "$result" "$2"
    cat "$build/$1.log"
}

# The engine without one rule, linked to a program of its own.
build_mutant() { # variant, rule
    mkdir "$build/$2"
    cp "$build/$1"/fst_*.o "$build/$2"
    grep -rl --include='fst_*.c' FST_KEEPS "$native" | while read -r source; do
        # shellcheck disable=SC2046,SC2086
        $CC -std=c11 -g -pthread -D_GNU_SOURCE= -D_FILE_OFFSET_BITS=64 $warnings $(flags_of "$1") ${CFLAGS:-} \
            "-DFST_OMIT=FST_RULE_$2" -I"$native" -c "$source" \
            -o "$build/$2/$(basename "$source" .c).o" || exit 1
    done || return 1
    # shellcheck disable=SC2046,SC2086
    $CC -pthread $(flags_of "$1") "$build/$1/test_device_order.o" "$build/$2"/fst_*.o -ldl \
        -o "$build/$2/mutant"
}

# A case that passes without its rule is no test of it.
run_mutants() { # variant, runner
    if ! $2 "$build/$1/test_device_order" list >"$build/cases"; then return 1; fi
    while read -r rule name; do
        if [ ! -d "$build/$rule" ] && ! build_mutant "$1" "$rule"; then return 1; fi
        TMPDIR=$build FAKE_CUDA=$build/$1/libfake_cuda.so $2 "$build/$rule/mutant" "$name" \
            >"$build/$1.log" 2>&1
        status=$?
        case $status in
        77) result=skipped ;;
        0 | 126 | 127 | 142) failed=$((failed + 1)) result=FAILED ;; # 142: it hung
        *) passed=$((passed + 1)) result=ok ;;                           # a crash is as good
        esac
        printf '%-8s %-8s %s without %s: exit status %s\n' "$1" "$result" "$name" "$rule" "$status"
        if [ "$result" = FAILED ]; then cat "$build/$1.log"; fi
    done <"$build/cases"
}

analyze() { # variant
    result=ok
    if ! $CC -fanalyzer -x c -c /dev/null -o /dev/null 2>/dev/null; then
        result=skipped # not gcc
        : >"$build/$1.log"
    elif ! find "$native" -name 'fst_*.c' ! -name fst_python.c | xargs -P "$jobs" -I '{}' \
        "$CC" -std=c11 -D_GNU_SOURCE= -D_FILE_OFFSET_BITS=64 -O2 -fanalyzer -Werror -I"$native" \
        -c '{}' -o /dev/null >"$build/$1.log" 2>&1; then
        failed=$((failed + 1)) result=FAILED
    else
        passed=$((passed + 1))
    fi
    printf '%-8s %-8s %s\n' "$1" "$result" "$CC -fanalyzer"
    cat "$build/$1.log"
}

# Leaves how many passed and how many failed in a file.
run_variant() { # variant
    if ! runner=$(runner_of "$1"); then
        printf '%-8s skipped: %s\n' "$1" "$(head -n 1 "$build/$1.log")"
    elif ! compile "$1"; then
        printf '%-8s FAILED   to build\n' "$1"
        failed=1
    else
        for program in $programs; do
            run_one "$1" "$program" "$runner"
        done
        if [ "$1" = none ] && ! run_mutants "$1" "$runner"; then
            printf '%-8s FAILED   to build without a rule\n' "$1"
            failed=$((failed + 1))
        fi
        if [ "$1" = none ]; then analyze "$1"; fi
    fi
    echo "$passed $failed" >"$build/$1.count"
}

for variant in $variants; do
    if [ -z "$(flags_of "$variant")" ]; then
        echo "no variant '$variant': none, address and thread exist" >&2
        exit 1
    fi
done
set -- # the processes, in the order of the variants
for variant in $variants; do
    run_variant "$variant" >"$build/$variant.said" 2>&1 &
    set -- "$@" "$!"
    pids=$*
done
all_passed=0 all_failed=0
for variant in $variants; do
    wait "$1"
    shift
    cat "$build/$variant.said"
    if ! read -r passed failed <"$build/$variant.count"; then passed=0 failed=1; fi
    all_passed=$((all_passed + passed)) all_failed=$((all_failed + failed))
done
pids=
echo "$all_passed passed, $all_failed failed"
[ "$all_failed" -eq 0 ]
