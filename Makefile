# The two main commands are `make demo` and `make test`. Each creates .venv, installs fastkd into it, and runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One worker more than cores, since some tests wait; at most 4, since each needs 2 to 4 GB of memory. worksteal: an idle
# worker takes over tests from a busy one.
TEST_WORKERS ?= -n $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))') --dist worksteal
# CUDA kernels are compiled for the visible GPU, and skipped without one even if nvcc is installed.
# `FASTKD_CUDA=1 make test` compiles them anyway; FASTKD_CUDA_TARGETS=all selects the chips of a wheel.
export FASTKD_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),auto,0)
# Python version on the GPU machine, which may differ from this one's.
WHEELHOUSE ?= wheelhouse
WHEELHOUSE_PYTHON ?= 3.12
SOURCES := pyproject.toml setup.py \
	$(shell find fastkd kernels csrc -type f -not -name '*.so' -not -path '*/__pycache__/*' 2>/dev/null)

VERSIONS ?= oldest torch-2.14 torch-2.15

.PHONY: help demo test test-versions check format bench teacher evidence-teacher wheelhouse clean

help:
	@echo "make demo        install into $(VENV), then distil a small student and write runs/demo/report.html"
	@echo "make test        install into $(VENV), then run the tests on the installed package"
	@echo "make test-versions  the same with the versions of each tests/versions/*.txt, each in .venv-NAME"
	@echo "make check       check format, lint and types, without changing anything"
	@echo "make bench       run the speed comparisons (pytest --benchmark-only)"
	@echo "make teacher     train the demo's teacher again (about an hour)"
	@echo "make evidence-teacher  train the teacher of ShapesRef again (about an hour), from the demo's"
	@echo "make wheelhouse  fetch wheels for scripts/gpu_check.sh on an offline machine (Python $(WHEELHOUSE_PYTHON))"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.ris: $(BIN)/python $(SOURCES)
	$(BIN)/python scripts/install.py --upgrade-strategy only-if-needed '.[ris]'
	@touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python scripts/install.py --upgrade-strategy only-if-needed '.[ris,test]'
	@touch $@ $(VENV)/.ris

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

demo: $(VENV)/.ris
	$(BIN)/fastkd demo $(DEMO_ARGS)

test: $(VENV)/.test
	FASTKD_TEST_INSTALLED=1 $(BIN)/pytest $(TEST_WORKERS) $(TEST_ARGS)

# The constraints also apply to the build requirements.
test-versions:
	for name in $(VERSIONS); do \
		PIP_CONSTRAINT=$(CURDIR)/tests/versions/$$name.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/tests/versions/$$name.txt \
			$(MAKE) test VENV=.venv-$$name || exit 1; \
	done

check: $(VENV)/.test $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --python-executable $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(VENV)/.test
	$(BIN)/pytest --benchmark-only

# The demo's teacher: trained on scenes of seed 1 (the demo uses seed 0) for 42 minutes on one core; stored in fp16.
teacher: $(VENV)/.ris
	$(BIN)/fastkd data make-shapes runs/teacher-data --images 16000 --image-size 64 --seed 1 --overwrite
	$(BIN)/fastkd train --data runs/teacher-data --model shapes-teacher --out runs/teacher --steps 60000 \
		--max-seconds 2500 --lr 1e-3 --warmup 300 --channels-last --precision bf16 --threads 1 \
		--eval-every 1600 --log-every 100 --overwrite
	$(BIN)/python scripts/pack_teacher.py runs/teacher/best fastkd/models/assets/shapes-teacher

# The teacher of ShapesRef: the demo's teacher, trained further on scenes of seed 1 (experiments use seed 0).
evidence-teacher: $(VENV)/.ris
	$(BIN)/fastkd data make-shapesref runs/evidence-teacher-data --images 16000 --seed 1 --overwrite
	$(BIN)/fastkd train --data runs/evidence-teacher-data --model fastkd/models/assets/shapes-teacher \
		--out runs/evidence-teacher --steps 60000 --max-seconds 2500 --lr 1e-3 --warmup 100 --channels-last \
		--precision bf16 --threads 1 --eval-every 1500 --log-every 100 --overwrite
	$(BIN)/python scripts/pack_teacher.py runs/evidence-teacher/best fastkd/models/assets/shapesref-teacher

wheelhouse: $(BIN)/python
	$(BIN)/python scripts/gpu/wheels.py fetch $(WHEELHOUSE) --python-version $(WHEELHOUSE_PYTHON)

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
