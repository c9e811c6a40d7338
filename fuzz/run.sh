#!/bin/sh
# run.sh HOURS | --seconds N [--seed S] | coverage
#
# Fuzzes the header parser and then the plan in C, under ASan and UBSan, and beside them the whole
# package against stock (differential.py). Exits with 1 when something was found, and says how to
# run that input again. The corpora grow from run to run, in FUZZ_DIR (build/fuzz).
#
# CLANG is a clang with libFuzzer; unset, `clang` or a clang-N of the system is tried (on Debian the
# packages clang-14 and libclang-rt-14-dev). Where there is none, CC (cc) builds the same targets
# with driver.c, which mutates blindly. `coverage` shows which lines the corpora reach.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
build=${FUZZ_DIR:-$root/build/fuzz}
seed=$(date +%s) seconds=0 covers=
case ${1:-} in
coverage) covers=yes ;;
--seconds)
    seconds=$2
    if [ "${3:-}" = --seed ]; then seed=$4; fi
    ;;
[0-9]*) seconds=$(awk -v hours="$1" 'BEGIN { printf "%d", 3600 * hours }') ;;
*)
    sed -n '2s/^# /usage: /p' "$0" >&2
    exit 2
    ;;
esac
mkdir -p "$build/objects" "$build/found" "$build/corpus/header" "$build/corpus/plan"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 1' HUP INT TERM

# ---- build

has_libfuzzer() {
    echo 'int LLVMFuzzerTestOneInput(void *, long); int LLVMFuzzerTestOneInput(void *a, long b) { return !a && b; }' \
        >"$build/empty.c"
    "$1" -fsanitize=fuzzer "$build/empty.c" -o "$build/empty" 2>/dev/null
}
clang=
for candidate in ${CLANG:-clang /usr/bin/clang-[0-9]*}; do
    if has_libfuzzer "$candidate"; then clang=$candidate && break; fi
done
flags="-std=c11 -g -O2 -pthread -D_GNU_SOURCE= -D_FILE_OFFSET_BITS=64 -fno-omit-frame-pointer"
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all"
if [ -n "$covers" ]; then sanitizers="-fprofile-instr-generate -fcoverage-mapping"; fi
if [ -n "$clang" ]; then
    compile="$clang $flags $sanitizers" watched="-fsanitize=fuzzer-no-link -fno-sanitize-coverage=trace-cmp" driver=-fsanitize=fuzzer
else
    echo "no clang with libFuzzer: ${CC:-cc} and driver.c mutate blindly"
    compile="${CC:-cc} $flags $sanitizers" watched='' driver=$build/objects/driver.o
fi
compile_all() { # flags; the files' names come in
    # shellcheck disable=SC2016 # the inner shell expands it
    COMPILE="$compile $1 -I$root/native -I$root/native/tests" OUT="$build/objects" \
        xargs -P "$(nproc)" -I '{}' sh -c '$COMPILE -c "$1" -o "$OUT/$(basename "$1" .c).o"' sh '{}'
}
find "$root/native" -name 'fst_*.c' ! -name fst_python.c | compile_all "$watched"
printf '%s\n' "$here"/*.c | compile_all ''
for target in header plan; do
    # shellcheck disable=SC2086 # flags are words
    $compile $driver "$build/objects/$target.o" "$build"/objects/fst_*.o -ldl -o "$build/$target"
done
export FAKE_CUDA=$build/libfake_cuda.so
# shellcheck disable=SC2086
${clang:-${CC:-cc}} $flags -fPIC -shared -fvisibility=hidden "$root"/native/tests/fake_*.c -o "$FAKE_CUDA"

# ---- run

export UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=malloc_context_size=4:quarantine_size_mb=8:max_malloc_fill_size=0
export LLVM_PROFILE_FILE=$build/none.profraw
runner=
if ! "$build/plan" -runs=0 >"$build/plan.log" 2>&1; then
    runner="setarch $(uname -m) -R" # with some settings of vm.mmap_rnd_bits ASan cannot start
fi
split -l 1 -a 4 "$here/header.seeds" "$build/corpus/header/seed-"

run_target() { # target, seconds
    set -- "$1" -max_total_time="$2" -seed="$seed"
    if [ "$1" = header ]; then set -- "$@" -dict="$here/header.dict"; fi
    case ${clang:+libfuzzer-}$1 in
    header) set -- "$@" "$here/header.seeds" ;;
    libfuzzer-header) set -- "$@" -max_len=4096 -mutate_depth=2 ;;
    # The fake driver keeps what is freed, which makes looking for leaks slow: the C tests do it.
    libfuzzer-plan) set -- "$@" -max_len=512 -len_control=0 -detect_leaks=0 ;;
    esac
    if [ -n "$clang" ]; then
        set -- "$@" -artifact_prefix="$build/found/$1-" -print_final_stats=1 -timeout=60 "$build/corpus/$1"
    fi
    target=$1
    shift
    # shellcheck disable=SC2086
    if $runner "$build/$target" "$@" >"$build/$target.log" 2>&1; then
        grep -E "^$target:|cov: .*ft:|average_exec_per_sec" "$build/$target.log" | tail -n 3
        return 0
    fi
    tail -n 60 "$build/$target.log"
    echo "found by $target: to run it again, $build/$target FILE (the name is above)"
    return 1
}

if [ -n "$covers" ]; then
    for target in header plan; do
        LLVM_PROFILE_FILE=$build/$target.profraw
        "$build/$target" -runs=0 "$build/corpus/$target" >"$build/$target.log" 2>&1
        "$($clang --print-prog-name=llvm-profdata)" merge "$LLVM_PROFILE_FILE" -o "$build/$target.profdata"
        echo "== $target"
        "$($clang --print-prog-name=llvm-cov)" report "$build/$target" -instr-profile="$build/$target.profdata" "$root"/native/*/*.c
    done
    exit 0
fi

beside=
if [ -e "$here/differential.py" ]; then
    python3 "$here/differential.py" --seconds "$seconds" --seed "$seed" &
    beside=$!
fi
status=0
run_target header $((seconds * 2 / 3 + 1)) || status=1 # 0 would be for ever
run_target plan $((seconds / 3 + 1)) || status=1
if [ -n "$beside" ]; then wait "$beside" || status=1; fi
exit $status
