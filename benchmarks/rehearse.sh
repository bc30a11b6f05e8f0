#!/usr/bin/env bash
# on_gpu.sh in small on this machine's CPU: from wheels, in a new environment, without a network where that can be had.
#   bash benchmarks/rehearse.sh PYTHON      an interpreter that has what a GPU's machine has
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
bash benchmarks/gpu_wheels.sh "$python" .nox/whl
alone=()
if unshare -rn true 2>/dev/null; then
    alone=(unshare -rn)
fi
export PYTHON=$python WHEELS=.nox/whl OUT=benchmarks/results/rehearsed
export LIMIT_environment=120 LIMIT_tests=900 LIMIT_steps=900 LIMIT_loss=300 LIMIT_queue=300
export PYTEST_ADDOPTS="-k 'not torch_compile'" # the steps compile
rm -rf "$OUT"
# a new network has nothing but a loopback that is down, and two workers meet on it
up='import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x41))'
"${alone[@]}" bash -c '[ $# = 0 ] || "$PYTHON" -c "$1"; exec bash benchmarks/on_gpu.sh --rehearse' - ${alone[0]:+"$up"}
