# Each target builds .venv first if it is missing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo demo-short test matrix lint bench gpu-wheels rehearse clean

demo: .venv/ready
	$(BIN)/python examples/demo/run.py

# the same code with few updates: it shows that all works, not what is learned
demo-short: .venv/ready
	$(BIN)/python examples/demo/run.py --out demo-short --teacher-updates 60 --student-updates 40 --adapter-updates 20 \
		--sequence-beam 1

test: .venv/ready
	$(BIN)/python -m pytest -n auto

# the tests on every Python that this machine has, from 3.8 on, with old and new torch
matrix: .venv/ready
	$(BIN)/nox

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/queue_gate.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/adapter_tuning.py
	$(BIN)/python benchmarks/teacher_pass.py --only speed
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/report.py

# what a machine with a GPU, torch and Python 3.12, but no network, lacks: for benchmarks/on_gpu.sh
GPU_PYTHON ?= python3.12
gpu-wheels:
	bash benchmarks/gpu_wheels.sh $(GPU_PYTHON)

# what runs on a GPU, in small on this machine's CPU
rehearse: .venv/ready
	bash benchmarks/rehearse.sh $(BIN)/python

# pip >= 24.1 refuses omegaconf 2.0.6, which fairseq needs
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'pip<24.1'
	$(BIN)/pip install --quiet '$(TORCH)' numpy
	$(BIN)/pip install --quiet --editable '.[fairseq,demo,dev]'
	touch $@

clean:
	rm -rf .venv .nox demo-run demo-short
