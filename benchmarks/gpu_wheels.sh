#!/usr/bin/env bash
# Fills a folder, .whl/, with what a machine that has torch, numpy and pytest, but no network, lacks to run this project.
#   bash benchmarks/gpu_wheels.sh [PYTHON] [FOLDER]     PYTHON is of that machine's version
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.12}
folder=${2:-.whl}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
pip="$work/env/bin/python -m pip --disable-pip-version-check"
$pip install --quiet 'pip==24.0' setuptools wheel cython numpy hatchling

# Each is named: what they require further is on that machine. pip 24.0 itself is among them, since later ones refuse
# omegaconf's requirements even with --no-deps.
$pip wheel --quiet --no-deps --wheel-dir "$work/whl" \
    pip==24.0 fairseq==0.12.2 hydra-core==1.0.7 omegaconf==2.0.6 antlr4-python3-runtime==4.8 \
    bitarray sacremoses cffi pycparser portalocker colorama tabulate sacrebleu liger-kernel
$pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/whl" .

rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
mv "$work/whl" "$folder"
du -sh "$folder"
