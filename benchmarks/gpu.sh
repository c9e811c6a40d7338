#!/usr/bin/env bash
# Everything that a GPU can tell us, in one go: tests, ceilings, benchmarks, a summary.
#
#   benchmarks/gpu.sh            all of it, up to an hour
#   benchmarks/gpu.sh quick      what fits five minutes of a fast machine
#   benchmarks/gpu.sh rehearse   every step without a GPU, small, over the fake driver: numbers
#                                mean nothing, but a typo shows here and not on a GPU's time
#
# A step that fails or runs into its time limit does not stop the next ones; the exit status is 1
# then, and 2 when there is no GPU. Environment:
#   PYTHON   whose torch is used (python3)
#   WHEELS   folder of wheels to install from, and from nowhere else (cffi, pycparser, and what
#            else is not installed of setuptools, numpy, safetensors, tqdm, wrapt, pytest,
#            hypothesis; with a wheel of fastst-patch itself no compiler is needed)
#   OUT      folder for the results (benchmarks/results/<name of the GPU>)
#   DATA     folder on a real disk for checkpoints (the first usual one that is)
#   ONLY     extended regular expression: run only steps whose names match
#   LIMIT    seconds for the whole (quick 290, else 3600)
set -uo pipefail
mode=${1:-full}
case $mode in
full) limit=3600 rounds=5 gb=auto many=18867 ceilings=() many_rounds=5 whole=() ;;
quick) limit=290 rounds=1 gb=5 many=18867 ceilings=(--quick) many_rounds=1 whole=(--gb 3) ;;
rehearse)
    limit=3600 rounds=1 gb=0.1 many=500 ceilings=(--quick) many_rounds=1
    whole=(--gb 0.05 --tensors 500 --rehearse)
    ;;
*) echo "usage: $0 [full | quick | rehearse]" >&2 && exit 2 ;;
esac
# shellcheck source=benchmarks/_gpu_common.sh
. "$(dirname "$0")/_gpu_common.sh"
limit=${LIMIT:-$limit}
only=${ONLY:-.}

data=
cleanup() {
    rm -rf "$work"
    if [ -n "$data" ]; then rm -rf "$data"; fi
}
trap cleanup EXIT
raw=$work/raw
log=$work/log.txt
mkdir "$raw"
cd "$work" || exit 1 # the checkout must not be what is imported
failed=0

say() { printf '%s\n' "$*" | tee -a "$log"; }

note() { # name, status, seconds
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$raw/steps.tsv"
}

skip() { # name, why
    say "=== $1: skipped: $2"
    note "$1" "skipped: $2" 0
}

step() { # name, time limit in seconds, command...
    local name=$1 seconds=$2 left=$((limit - SECONDS)) begin=$SECONDS status
    shift 2
    [[ $name =~ $only ]] || return 0
    if [ "$left" -lt 5 ]; then
        skip "$name" "out of time"
        failed=1
        return 1
    fi
    if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
    say "=== $name (at ${SECONDS} s, at most $seconds s)"
    timeout -k 10 "$seconds" "$@" 2>&1 | tee "$raw/$name.txt" | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
    0) note "$name" ok $((SECONDS - begin)) ;;
    124 | 137) note "$name" "time limit" $((SECONDS - begin)) ;;
    *) note "$name" "exit $status" $((SECONDS - begin)) ;;
    esac
    summarize
    if [ "$status" -eq 0 ]; then return 0; fi
    failed=1
    say "=== $name FAILED ($status)"
    return 1
}

results=$out
summarize() { # after every step, so that whatever ends this leaves what there is
    if [ -z "$results" ]; then return; fi
    mkdir -p "$results"
    cp "$log" "$results/log.txt"
    "${PYTHON:-python3}" "$root/benchmarks/gpu_summary.py" "$raw" "$results" || failed=1
}

hardware() {
    uname -srm
    lscpu | grep -E '^(Model name|CPU\(s\)|Socket|NUMA node)' || true
    free -g || true
    df -hT "$root" /tmp || true
    ulimit -l | sed 's/^/locked memory limit: /'
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi
        nvidia-smi topo -m || true
        nvidia-smi -q -d CLOCK | head -n 40 || true
    else
        echo "nvidia-smi: not on PATH"
    fi
}

# What torch has loaded counts: its own wheels bring the library.
has_cufile() {
    [ "$mode" = rehearse ] || "$python" -c '
import ctypes, torch
torch.cuda.init()
ctypes.CDLL("libcufile.so.0")' 2>>"$log"
}

# In one process, for which pytest-xdist need not be there.
pytest_cuda() {
    "$@" "$python" -m pytest -q -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider \
        -o addopts='-ra --strict-markers --import-mode=importlib' -m cuda "$root/tests"
}

sanitizer() {
    pytest_cuda compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9
}

checkpoints() {
    "$python" "$root/benchmarks/write_checkpoint.py" "$data/dense.safetensors" --gb "$gb" &&
        "$python" "$root/benchmarks/write_checkpoint.py" "$data/many.safetensors" --many "$many"
}

bench() { # name, time limit, file, then arguments
    local name=$1 seconds=$2 file=$data/$3.safetensors
    shift 3
    step "bench-$name" "$seconds" "$work/venv/bin/fastst-patch" bench "$file" --device cuda \
        --repeat "$rounds" --max-seconds $((seconds * 2 / 3)) --json "$raw/bench-$name.json" "$@"
}

# ---- the steps ----

export -f install environment see_gpu hardware pytest_cuda sanitizer checkpoints fake_driver
export root work raw data python gb many mode wheels

step hardware 60 bash -c hardware
only_saved=$only only=.
step environment 300 bash -c "environment 'pytest>=8' 'hypothesis>=6.100'" || {
    say "gpu.sh: nothing can be measured without the package"
    exit 1
}
if [ "$mode" = rehearse ]; then
    skip gpu "a rehearsal: the fake driver takes its place"
    step fake-driver 60 bash -c fake_driver || exit 1
    results=${out:-$work/results}
else
    step gpu 120 bash -c see_gpu || exit 2
    results=${out:-$root/benchmarks/results/$(gpu_name)}
fi
only=$only_saved
place=$("$python" -c 'import sys; from fastst_patch.bench.checkpoint import pick_directory as p
print(p(sys.argv[1] or None))' "$data_folder") || {
    say "gpu.sh: no place for checkpoints"
    exit 1
}
data=$(mktemp -d "$place/fastst-gpu-XXXXXX")
export data

step doctor 150 "$work/venv/bin/fastst-patch" doctor "$data"
# Over the fake, tests marked cuda are skipped, each with its reason: that they can be collected.
step tests 600 bash -c pytest_cuda
if [ "$mode" = quick ]; then
    skip sanitizer "quick"
elif ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "compute-sanitizer is not on PATH"
elif [ "$mode" = rehearse ]; then
    skip sanitizer "a rehearsal"
else
    step sanitizer 900 bash -c sanitizer
fi

only_saved=$only only=.
step checkpoints 300 bash -c checkpoints || exit 1
only=$only_saved
if [ "$mode" = rehearse ]; then rehearse; fi

bench dense-dlpack-auto 600 dense -o tensors=dlpack
if has_cufile; then gds=yes; else gds=; fi
step ceilings 400 "$python" "$root/benchmarks/gpu_ceilings.py" --file "$data/dense.safetensors" \
    "${ceilings[@]}" --json "$raw/ceilings.json"
step first-load 200 "$python" "$root/benchmarks/first_load.py" "$data/dense.safetensors" \
    --rounds "$(((rounds + 1) / 2))" --json "$raw/first-load.json"
for tensors in dlpack owned; do
    step "many-$tensors" 200 "$python" "$root/benchmarks/many_tensors.py" --tensors "$many" \
        --rounds "$many_rounds" --device cuda -o "tensors=$tensors" --dir "$data" \
        --json "$raw/many-$tensors.json"
done
# What users call; a row whose library is missing says so. cuda-pipeline last: it makes its model.
whole_rows=cuda-device-map,cuda-to,cuda-moe,cuda-pipeline
if [ "$mode" = quick ]; then whole_rows=${whole_rows%,*}; fi
step end-to-end 900 "$python" "$root/benchmarks/end_to_end.py" --rows "$whole_rows" \
    --repeat "$rounds" --max-seconds 250 "${whole[@]}" --dir "$data" --json "$raw/end-to-end.json"
owned_cache=both
if [ "$mode" = quick ]; then owned_cache=warm; fi
bench dense-owned-auto 400 dense --no-ceilings --cache "$owned_cache" -o tensors=owned
bench dense-dlpack-direct 400 dense --cache cold --no-ceilings --io direct -o tensors=dlpack
if [ -n "$gds" ]; then
    bench dense-dlpack-gds 400 dense --cache cold --no-ceilings --io gds -o tensors=dlpack
else
    skip bench-dense-dlpack-gds "no libcufile.so.0"
fi
if [ "$mode" = quick ]; then
    skip bench-rest "quick"
else
    bench dense-owned-direct 400 dense --cache cold --no-ceilings --io direct -o tensors=owned
    bench dense-owned-gds 400 dense --cache cold --no-ceilings --io gds -o tensors=owned
    bench dense-dlpack-direct-warm 400 dense --cache warm --no-ceilings --io direct -o tensors=dlpack
    for threads in 2 4 8 16; do
        bench "dense-threads-$threads" 300 dense --cache warm --no-ceilings -o "threads=$threads"
    done
    for chunk in 1MiB 16MiB; do
        bench "dense-chunk-$chunk" 300 dense --cache warm --no-ceilings -o "chunk_bytes=$chunk"
    done
    bench many-dlpack 300 many --no-ceilings -o tensors=dlpack
    bench many-owned 300 many --no-ceilings -o tensors=owned
fi

summarize
say "=== results in $results; at ${SECONDS} s; $([ "$failed" -eq 0 ] && echo "all steps passed" || echo "some steps FAILED")"
if [ "$mode" = rehearse ]; then cat "$results/summary.md"; fi
exit "$failed"
