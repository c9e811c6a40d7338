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
root=$(cd "$(dirname "$0")/.." && pwd)
absolute() { case $1 in '' | /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
out=$(absolute "${OUT:-}") wheels=$(absolute "${WHEELS:-}") data=$(absolute "${DATA:-}")
case ${PYTHON:-} in */*) PYTHON=$(absolute "$PYTHON") && export PYTHON ;; esac
mode=${1:-full}
shift $(($# > 0))
case $mode in
full) limit=${LIMIT:-21600} race=(--device cuda --suite full) ;;
quick) limit=${LIMIT:-530} race=(--device cuda --suite quick) ;;
rehearse) limit=${LIMIT:-600} race=(--device cuda --suite quick --rounds 1 --no-end-to-end
    --workloads llama-3-8b-lora --loaders stock-mmap,fastst,fastst-direct) ;;
*) echo "usage: $0 [full | quick | rehearse] [argument of the race ...]" >&2 && exit 2 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
unset CI FASTST_ENABLED
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export FASTST_RACE_ENVIRONMENTS=$work/environments
python=$work/venv/bin/python
from=()
if [ -n "$wheels" ]; then from=(--no-index --find-links "$wheels"); fi
pip() { "$python" -m pip install -q "${from[@]}" "$@"; }
say() { printf '=== %s (at %s s)\n' "$*" "$SECONDS" >&2; }

# What the chosen python sees is seen by the new one, also when that is a venv's own.
base=${PYTHON:-python3}
say environment
"$base" -m venv --without-pip --system-site-packages "$work/venv" || exit 1
"$base" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
    >"$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || exit 1
pip 'setuptools>=77' 'cffi>=1.17' numpy 'safetensors>=0.4.3' 'tqdm>=4.60' 'wrapt>=1.16' \
    'matplotlib>=3.7' || exit 1
if "$python" -m pip install -q --no-deps --no-build-isolation --force-reinstall "$root"; then
    echo "built from the repository" >&2
elif [ -n "$wheels" ] && pip --no-deps --force-reinstall fastst-patch; then
    echo "NOT built from the repository: the wheel carried is used" >&2
else
    exit 1
fi
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
    pip -c "$work/kept" "$rival" 2>"$work/refusal" || pip --no-deps "$rival" 2>"$work/refusal" ||
        echo "not installed: $rival: $(grep -m1 ERROR "$work/refusal" || echo "no reason given")" >&2
done <"$work/rivals"

name=rehearsal
if [ "$mode" != rehearse ]; then
    say gpu
    "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else
f"gpu_race.sh: torch {torch.__version__} sees no usable GPU")' || exit 2
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))')
    name=$(printf '%s' "$name" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-//; s/-$//')
    results=${out:-$root/benchmarks/results/$name/race}
else
    results=${out:-$work/results}
    say "fake driver"
    (cd "$root/tests/support" && "$python" -c '
import sys, pathlib, fake_device
assert fake_device.build(pathlib.Path(sys.argv[1])), "no compiler"' "$work") || exit 1
    export REHEARSAL_DRIVER=$work/libfake_cuda.so PYTHONPATH=$root/tests/support/rehearsal
fi

# The race plans with what is left, and keeps a minute for drawing and for being wrong.
if [ "$mode" = quick ]; then
    minutes=$("$python" -c "print(max(1.0, ($limit - $SECONDS - 60) / 60))")
    race+=(--minutes "$minutes")
fi
if [ -n "$wheels" ]; then race+=(--wheels "$wheels"); fi
if [ -n "$data" ]; then race+=(--dir "$data"); fi
left=$((limit - SECONDS))
say "race, at most $left s, results in $results"
cd "$root" || exit 1
timeout --foreground -k 30 "$left" "$python" -m benchmarks race "${race[@]}" --out "$results" "$@"
status=$?
say "done: exit status $status"
exit "$status"
