#!/usr/bin/env bash
# The race on a GPU machine, from nothing but this repository and carried wheels.
#
#   benchmarks/gpu_race.sh           the full suite, true sizes where they fit: hours
#   benchmarks/gpu_race.sh quick     within nine minutes
#   benchmarks/gpu_race.sh rehearse  every step without a GPU, small, over the fake driver: numbers
#                                    mean nothing, but a typo shows here and not on a GPU's time
#
# The exit status is 2 when there is no GPU, else that of the race. Environment:
#   PYTHON   whose torch is used (python3)
#   WHEELS   folder of wheels to install from, and from nowhere else: cffi, pycparser, matplotlib
#            and what of setuptools, numpy, safetensors, tqdm, wrapt is not installed; every rival
#            (`pip download --no-deps fastsafetensors ...`: who is not there is listed as missing),
#            safetensors 0.9.0rc1; with a wheel of fastst-patch itself no compiler is needed
#   OUT      folder for the results (benchmarks/results/<name of the GPU>/race)
#   DATA     folder on a real disk for checkpoints (the first usual one that is)
#   LIMIT    seconds for the whole (quick 530, rehearse 600, else 6 hours)
# Further arguments go to `python -m benchmarks race`.
set -uo pipefail
mode=${1:-full}
shift $(($# > 0))
case $mode in
full) limit=${LIMIT:-21600} race=(--device cuda --suite full) ;;
quick) limit=${LIMIT:-530} race=(--device cuda --suite quick) ;;
rehearse) limit=${LIMIT:-600} race=(--device cuda --suite quick --rounds 1 --no-end-to-end
    --workloads llama-3-8b-lora --loaders stock-mmap,fastst,fastst-direct) ;;
*) echo "usage: $0 [full | quick | rehearse] [argument of the race ...]" >&2 && exit 2 ;;
esac

# shellcheck source=benchmarks/_gpu_common.sh
. "$(dirname "$0")/_gpu_common.sh"
trap 'rm -rf "$work"' EXIT
export FASTST_RACE_ENVIRONMENTS=$work/environments
say() { printf '=== %s (at %s s)\n' "$*" "$SECONDS" >&2; }

say environment
environment 'matplotlib>=3.7' || exit 1
# Each rival on its own: one that cannot be installed is missing from the race, with its reason.
# The bounds are those of the extra `bench`; none may change what is installed already.
"$python" - "$root/pyproject.toml" >"$work/rivals" <<'PY'
import re, sys
text = open(sys.argv[1], encoding="utf-8").read()
extra = re.search(r"^bench = \[(.*?)^\]", text, re.M | re.S)[1]
print("\n".join(one for one in re.findall(r'"([^"]+)"', extra) if not one.startswith("fastst-patch")))
PY
"$python" -m pip freeze 2>/dev/null | grep -E '^(torch|numpy|safetensors|nvidia-[a-z0-9-]+)==' >"$work/kept"
while read -r rival; do
    # What it needs beside it may be neither carried nor needed to load: then without.
    install -c "$work/kept" "$rival" 2>"$work/refusal" || install --no-deps "$rival" 2>"$work/refusal" ||
        echo "not installed: $rival: $(grep -m1 ERROR "$work/refusal" || echo "no reason given")" >&2
done <"$work/rivals"

if [ "$mode" != rehearse ]; then
    say gpu
    see_gpu >&2 || exit 2
    results=${out:-$root/benchmarks/results/$(gpu_name)/race}
else
    results=${out:-$work/results}
    say "fake driver"
    fake_driver || exit 1
    rehearse
fi

# The race plans with what is left, and keeps a minute for drawing and for being wrong.
if [ "$mode" = quick ]; then
    minutes=$("$python" -c "print(max(1.0, ($limit - $SECONDS - 60) / 60))")
    race+=(--minutes "$minutes")
fi
if [ -n "$wheels" ]; then race+=(--wheels "$wheels"); fi
if [ -n "$data_folder" ]; then race+=(--dir "$data_folder"); fi
left=$((limit - SECONDS))
say "race, at most $left s, results in $results"
cd "$root" || exit 1
timeout --foreground -k 30 "$left" "$python" -m benchmarks race "${race[@]}" --out "$results" "$@"
status=$?
say "done: exit status $status"
exit "$status"
