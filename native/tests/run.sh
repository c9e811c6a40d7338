#!/bin/sh
# run.sh [variant ...] - builds the engine without Python and runs its C tests.
#
# Variants: address (ASan and UBSan), thread (TSan), none (warnings are errors); all three
# when none is named. CC chooses the compiler, CFLAGS adds flags, JOBS says how many
# compilers run at once, and TMPDIR where builds and test files go: on a disk, since tmpfs
# may refuse O_DIRECT. Exits with 1 when anything failed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
native=$(dirname "$here")
CC=${CC:-cc}
variants=${*:-none address thread}
jobs=${JOBS:-$(nproc 2>/dev/null || echo 2)}
warnings="-Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wformat=2"
passed=0 failed=0

on_disk() { [ -d "$1" ] && [ -w "$1" ] && [ "$(stat -f -c %T "$1" 2>/dev/null)" != tmpfs ]; }

if [ -z "${TMPDIR:-}" ]; then
    for TMPDIR in /tmp /var/tmp .; do
        if on_disk "$TMPDIR"; then break; fi
    done
fi
build=$(mktemp -d "$TMPDIR/fst_tests.XXXXXX") || exit 1
trap 'rm -rf "$build"' EXIT
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
    echo 'int main(void) { return 0; }' >"$build/empty.c"
    # shellcheck disable=SC2046 # flags are words
    $CC $(flags_of "$1") "$build/empty.c" -o "$build/empty" 2>"$build/log" || return 1
    for runner in "" "setarch $(uname -m) -R"; do
        if $runner "$build/empty" >"$build/log" 2>&1; then
            echo "$runner"
            return 0
        fi
    done
    return 1
}

compile() { # variant
    mkdir "$build/$1"
    # shellcheck disable=SC2016 # the inner shell expands it
    for source in "$native"/fst_*.c "$here"/*.c; do
        [ "$(basename "$source")" = fst_python.c ] || echo "$source"
    done | FLAGS="-std=c11 -g -pthread -D_FILE_OFFSET_BITS=64 $warnings $(flags_of "$1") ${CFLAGS:-}" \
        CC=$CC OUT="$build/$1" NATIVE=$native \
        xargs -P "$jobs" -I '{}' sh -c '$CC $FLAGS -I"$NATIVE" -c "$1" -o "$OUT/$(basename "$1" .c).o"' sh '{}' ||
        return 1
    for source in "$here"/*.c; do
        program=$(basename "$source" .c) wrap=
        if [ "$program" = test_nomem ]; then wrap=-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc; fi
        # shellcheck disable=SC2046,SC2086
        $CC -pthread $(flags_of "$1") $wrap "$build/$1/$program.o" "$build/$1"/fst_*.o \
            -o "$build/$1/$program" || return 1
    done
}

run_one() { # variant, program, runner
    arguments=
    case $2:$1 in
    fuzz_header:thread) arguments=10000 ;;
    fuzz_header:*) arguments=200000 ;;
    esac
    # shellcheck disable=SC2086
    TMPDIR=$build UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=die_after_fork=0:halt_on_error=1 \
        $3 "$build/$1/$2" $arguments >"$build/log" 2>&1
    case $? in
    0) passed=$((passed + 1)) result=ok ;;
    77) result=skipped ;;
    *) failed=$((failed + 1)) result=FAILED ;;
    esac
    printf '%-8s %-8s %s\n' "$1" "$result" "$2"
    cat "$build/log"
}

for variant in $variants; do
    if [ -z "$(flags_of "$variant")" ]; then
        echo "no variant '$variant': none, address and thread exist" >&2
        exit 1
    fi
    if ! runner=$(runner_of "$variant"); then
        printf '%-8s skipped: %s\n' "$variant" "$(head -n 1 "$build/log")"
        continue
    fi
    if ! compile "$variant"; then
        printf '%-8s FAILED   to build\n' "$variant"
        failed=$((failed + 1))
        continue
    fi
    for source in "$here"/*.c; do
        run_one "$variant" "$(basename "$source" .c)" "$runner"
    done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
