# shellcheck shell=bash
# What gpu.sh and gpu_race.sh share; both source it. Sets root, out, wheels, data_folder, work and
# python from the environment that they document.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
absolute() { case $1 in '' | /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
out=$(absolute "${OUT:-}") wheels=$(absolute "${WHEELS:-}") data_folder=$(absolute "${DATA:-}")
case ${PYTHON:-} in */*) PYTHON=$(absolute "$PYTHON") && export PYTHON ;; esac
work=$(mktemp -d)
python=$work/venv/bin/python
trap 'exit 130' INT
trap 'exit 143' TERM HUP
unset CI FASTST_ENABLED
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

install() { # arguments of pip install
    local from=()
    if [ -n "$wheels" ]; then from=(--no-index --find-links "$wheels"); fi
    "$python" -m pip install -q "${from[@]}" "$@"
}

# Makes the environment in $work/venv and installs the package, with more packages if named. What
# the chosen python sees is seen by the new one, also when that is a venv's own.
environment() {
    local base=${PYTHON:-python3}
    "$base" -m venv --without-pip --system-site-packages "$work/venv" || return 1
    "$base" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
        >"$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return 1
    install 'setuptools>=77' 'cffi>=1.17' numpy 'safetensors>=0.4.3' 'tqdm>=4.60' 'wrapt>=1.16' \
        "$@" || return 1
    if "$python" -m pip install -q --no-deps --no-build-isolation --force-reinstall "$root"; then
        echo "built from the repository" >&2
    elif [ -n "$wheels" ]; then
        install --no-deps --force-reinstall fastst-patch || return 1
        echo "NOT built from the repository: the wheel carried is used" >&2
    else
        return 1
    fi
    # Not in the checkout, which must not be what is imported.
    (cd "$work" && "$python" -c 'import fastst_patch.engine as e
assert e.native_error() is None, e.native_error()
print(e.native_file())') >&2
}

see_gpu() {
    "$python" -c 'import sys, torch
if torch.version.cuda is None and torch.version.hip is None:
    sys.exit(f"this torch ({torch.__version__}) is built without CUDA")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no usable GPU")
print(torch.cuda.get_device_name(0), "torch", torch.__version__)'
}

gpu_name() { # as a folder is named
    "$python" -c 'import torch; print(torch.cuda.get_device_name(0))' |
        tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-//; s/-$//'
}

fake_driver() {
    (cd "$root/tests/support" && "$python" -c '
import sys, pathlib, fake_device
assert fake_device.build(pathlib.Path(sys.argv[1])), "no compiler"' "$work")
}

rehearse() { # from now on the fake driver stands for the GPU
    export REHEARSAL_DRIVER=$work/libfake_cuda.so PYTHONPATH=$root/tests/support/rehearsal
}
