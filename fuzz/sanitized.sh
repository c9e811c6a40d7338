#!/bin/sh
# sanitized.sh [address|thread] [pytest arguments] - builds the extension with a sanitizer, and runs
# tests of Python over it; by default those of tests/dropin, tests/files and tests/device.
#
# Only the extension and the fake driver are instrumented: Python, torch and safetensors are as they
# are installed. Reports go to files, also those of processes that tests start; each is printed at the
# end. Exits with 1 when there was a report, or a test failed.
# PYTHON is the interpreter with the test dependencies, CC the compiler, TMPDIR the place of builds.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
kind=${1:-address}
[ $# -gt 0 ] && shift
PYTHON=$(command -v "${PYTHON:-python}") || exit 1
CC=${CC:-cc}
build=$(mktemp -d "${TMPDIR:-/tmp}/fst_sanitized.XXXXXX") || exit 1
trap 'rm -rf "$build"' EXIT
trap 'exit 1' HUP INT TERM

# Python loads C++ that throws: the sanitizer looks for its runtime before any of it is there.
case $kind in
address)
    libraries="libasan.so libstdc++.so.6" flags="-fsanitize=address,undefined"
    export PYTHONMALLOC=malloc # so that it sees where objects end
    ;;
thread) libraries="libtsan.so libstdc++.so.6" flags="-fsanitize=thread" ;;
*)
    echo "no sanitizer '$kind': address and thread exist" >&2
    exit 1
    ;;
esac
preload=
for library in $libraries; do
    preload="$preload $("$CC" -print-file-name="$library")" || exit 1
done

echo "building with FASTST_SANITIZE=$kind"
# In a copy: builds in the checkout would take each other's objects.
mkdir "$build/source" || exit 1
cp -R "$root/fastst_patch" "$root/native" "$root"/*.py "$root"/*.toml "$root"/*.md "$root/LICENSE" \
    "$build/source" || exit 1
find "$build/source" -name '*.so' -exec rm {} +
FASTST_SANITIZE=$kind FASTST_WERROR=1 \
    "$PYTHON" -m pip install --quiet --no-deps --target "$build/site" "$build/source" || exit 1

# Leaks: Python and torch keep what they allocate once, and C tests look for ours. Torch's C++ is
# not instrumented, so containers that cross the border look odd.
asan="detect_leaks=0:allocator_may_return_null=1:detect_container_overflow=0"
# What code that is not instrumented reads and writes is not looked at: its atomics are not seen. Its
# mutexes are, the GIL among them. Processes that raced end as they would have.
tsan="die_after_fork=0:history_size=4:ignore_noninstrumented_modules=1:exitcode=0"
mkdir "$build/reports" || exit 1
log="log_path=$build/reports/report"
runner=
if ! LD_PRELOAD=$preload "$PYTHON" -c pass >"$build/start" 2>&1; then
    runner="setarch $(uname -m) -R" # with some settings of vm.mmap_rnd_bits
fi

[ $# -gt 0 ] || set -- tests/dropin tests/files tests/device
cd "$root" || exit 1
# The checkout is not what is imported. What a test starts inherits all of this.
without_checkout='import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())'
env LD_PRELOAD="$preload" PYTHONPATH="$build/site" CFLAGS="$flags" \
    ASAN_OPTIONS="$asan:$log" UBSAN_OPTIONS="print_stacktrace=1:$log" TSAN_OPTIONS="$tsan:$log" \
    $runner "$PYTHON" -c "$without_checkout" -p no:cacheprovider -q "$@"
status=$?
reports=$(find "$build/reports" -type f | sort)
for report in $reports; do
    echo "--- $(basename "$report")"
    cat "$report"
done
echo "$kind: pytest ended with $status, $(echo "$reports" | grep -c .) processes reported"
[ "$status" -eq 0 ] && [ -z "$reports" ]
