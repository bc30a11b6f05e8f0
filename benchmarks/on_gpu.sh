#!/usr/bin/env bash
# Everything that is to be tested and measured on a GPU, in an order of worth: 8 minutes on a machine without a network.
#
#   make gpu-wheels                                 where there is a network, with the GPU's machine's Python
#   OUT=results bash benchmarks/on_gpu.sh           on that machine: its python3 has torch, numpy, pytest and pytest-xdist
#   OUT=results bash benchmarks/on_gpu.sh --rehearse    the same in small, on a CPU
#
# STEPS names some of: environment steps tests loss queue decoding adapters. LIMIT_loss is the time limit of that
# step in seconds, ARGS_loss more arguments of it, and so for the others; PYTEST_ADDOPTS says which tests. PYTHON is the
# interpreter, WHEELS the folder of the wheels.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-benchmarks/results/gpu}")
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-environment steps tests loss queue}
REHEARSE=${1:-}
workers=14
if [ "$REHEARSE" = --rehearse ]; then
    workers=2
    export KD_EXT_REHEARSE=1
fi
mkdir -p "$OUT"
export PYTHONPATH="$PWD" KD_EXT_RESULTS="$OUT" KD_EXT_FAILURES="$OUT/failures.txt" PYTHONUNBUFFERED=1

# An environment of its own on top of the interpreter's: the start-up line works from site-packages alone.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
env=$work/env
"$PYTHON" -m venv --without-pip "$env" || exit 1
base=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$base')" > "$site/base.pth"
wheels=${WHEELS:-.whl}
"$env/bin/python" "$wheels"/pip-24.0-py3-none-any.whl/pip --disable-pip-version-check install --quiet --no-index \
    --no-deps --no-compile --ignore-installed "$wheels"/*.whl || exit 1
python="$env/bin/python"

# what is printed last is what was reached; a step that fails or runs out of time does not end the others
step() {
    local name=$1 limit=$2 status
    shift 2
    case " $STEPS " in *" $name "*) ;; *) return ;; esac
    local start=$SECONDS own_limit=LIMIT_$name own_arguments=ARGS_$name
    echo "== $name" >> "$OUT/log.txt"
    # shellcheck disable=SC2086
    timeout -k 5 "${!own_limit:-$limit}" "$@" ${!own_arguments:-} >> "$OUT/log.txt" 2>&1
    status=$?
    echo "$name: exit status $status after $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
    [ $status = 0 ] || failed=1
}
failed=0

step environment 20 "$python" -m kd_ext.doctor
step steps 220 "$python" benchmarks/gpu_steps.py $REHEARSE --profile "$OUT/step_profile.txt"
step tests 150 "$python" -m pytest -n $workers -m gpu -v -p no:cacheprovider -W ignore --tb=short --durations=5 \
    tests/test_gpu.py
step loss 50 "$python" benchmarks/gpu_loss.py $REHEARSE --profile "$OUT/loss_profile.txt"
step queue 20 "$python" benchmarks/queue_gate.py
step decoding 60 "$python" benchmarks/decoding.py
step adapters 60 "$python" benchmarks/adapter_tuning.py
[ $failed = 0 ] || tail -n 40 "$OUT/log.txt"
exit $failed
