# `make train` and `make test` need nothing but Python: they set up .venv themselves.
#   PYTHON  the interpreter to make .venv with
#   TORCH   the torch to install, as pip takes it: TORCH=torch==2.14.1
#   LOCK    a file of pinned requirements to install instead, torch too, as CI does (.ci/run)
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
LOCK ?=
PYTEST_ARGS ?=

# The version as pip knows it: a torchvision belongs to exactly one, and is never to change it.
TORCH_VERSION = from importlib.metadata import version; print(version("torch"))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CXX_FILES = $(shell git ls-files '*.cu' '*.cuh' '*.cpp' '*.h')

# A GPU without a toolkit to compile for it gets the compiler from PyPI with the package.
TOOLKIT := $(PYTHON) batchnorm_cuda/_build/toolkit.py >/dev/null 2>&1
NVCC_EXTRA = $(shell nvidia-smi -L >/dev/null 2>&1 && ! $(TOOLKIT) && echo ,nvcc)

.PHONY: help venv train test lint docs cuda sass extension extension-host standalone \
	standalone-host bench gpu-check gpu-check-rehearsal visit-rehearsal readme lock sbom wheel \
	versions clean FORCE

help:
	@echo "make train   train the digits example        make lint   check formatting and style"
	@echo "make test    run the test suite              make cuda   compile ahead of time with nvcc"
	@echo "make venv    set up $(VENV) only               make docs   build the documentation"
	@echo "make sass    report the kernels' machine code  make standalone  the driver without PyTorch"
	@echo "make bench   time batch norm, or model it    make gpu-check   check all on a GPU, time it"
	@echo "make readme  write its performance section   make clean   remove $(VENV) and build output"
	@echo "make wheel   a compiled wheel, checked       make sbom    what the package ships and needs"
	@echo "make lock    pin CI's requirements anew      make versions  try other versions of torch"
	@echo "make visit-rehearsal  the visit to a lent GPU, as far as it goes without one"

venv: $(VENV)/.ready

# The package is installed editable: the sources in this tree are what runs.
$(VENV)/.ready: pyproject.toml setup.py $(VENV)/.torch
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(LOCK),)
	$(PIP) --require-hashes -r $(LOCK)
	$(PIP) --no-build-isolation --no-deps -e .
else
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e ".[test,train,bench,dev,docs,sass$(NVCC_EXTRA)]" "$(TORCH)"
	@$(PIP) torchvision "torch==$$($(BIN)/python -c '$(TORCH_VERSION)')" \
		|| echo "no torchvision fits this torch: its tests are left out"
endif
	touch $@

# Changes when TORCH or LOCK does, so that asking for another version installs it.
ASKED = $(if $(LOCK),$(LOCK) $(shell cksum < $(LOCK)),$(TORCH))
$(VENV)/.torch: FORCE
	@mkdir -p $(VENV)
	@echo '$(ASKED)' | cmp -s - $@ || echo '$(ASKED)' > $@

# CI's requirements anew, every version and hash of them: for its platform and Python only.
# runtime.txt is what the package itself needs, in the same versions: the SBOM's source.
COMPILE = $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock"
lock: venv
	$(PIP) -e ".[release]"
	$(COMPILE) --all-extras pyproject.toml .ci/requirements.in -o .ci/requirements.txt
	$(COMPILE) .ci/visit.in -o .ci/visit.txt
	$(COMPILE) -c .ci/requirements.txt pyproject.toml -o .ci/runtime.txt

# A CycloneDX bill of what the package ships and needs, in the versions that CI tests.
sbom: venv
	@$(BIN)/python -c "import cyclonedx_py" 2>/dev/null || $(PIP) -e ".[release]"
	$(BIN)/python -m tools.sbom

train: venv
	$(BIN)/python examples/train_digits.py

# On the GPU where there is one, else on the kernels' CPU emulation (tests/conftest.py chooses).
test: venv
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# Every reference that leads nowhere is an error. The pages are then in build/docs/index.html.
docs: venv
	$(BIN)/python -m sphinx --nitpicky --fail-on-warning --keep-going --quiet -E \
		-d build/doctrees docs build/docs

# What only nvcc can tell: builds for real architectures, which link, load and hold their code, and
# the rules of the machine code for two of them (`make sass`: for all).
# The compiler is the machine's, else it comes from PyPI.
cuda: venv
	$(BIN)/python batchnorm_cuda/_build/toolkit.py || $(PIP) -e ".[nvcc]" "$(TORCH)"
	$(BIN)/python batchnorm_cuda/_build/toolkit.py
	$(BIN)/python -m pytest -m nvcc tests/package/test_install.py tests/benchmark/test_standalone.py
	$(BIN)/python -m pytest -m nvcc -k "9.0 or 10.0" tests/benchmark/test_sass.py tests/benchmark/test_issue_budget.py

# What the compiler made of the kernels, for every architecture; and that it holds the rules.
sass: venv
	$(BIN)/python -m bench.sass
	$(BIN)/python -m bench.sass --budget
	$(BIN)/python -m pytest -m "nvcc or not nvcc" tests/benchmark/test_sass.py tests/benchmark/test_issue_budget.py

# A wheel of the compiled package for this torch and Python, checked where nothing can be compiled:
# dist/batchnorm_cuda-<version>+torch<version>.cu<version>-<python>-<platform>.whl
wheel: venv
	$(BIN)/python -m tools.wheel

# Other versions of torch, one after another in environments of their own; then the FAQ's table.
VERSIONS ?=
versions: venv
	$(BIN)/python -m tools.versions $(VERSIONS)

# The extension as it is built at the first use, for the GPU that is here; and for the CPU.
extension:
	$(PYTHON) -c "from batchnorm_cuda._build import extension; \
		extension.load_cuda(); extension.build_kernels()"
extension-host:
	$(PYTHON) -c "from batchnorm_cuda._build import extension; extension.load_emulated()"

# The kernels and the plan without Python and PyTorch, as a program: for the GPU, and for the CPU.
standalone:
	$(MAKE) -C bench/standalone cuda PYTHON=$(PYTHON)
standalone-host:
	$(MAKE) -C bench/standalone host PYTHON=$(PYTHON)

# On the GPU against cuDNN and others; without one, bytes by models: `python -m bench --help`.
BENCH_ARGS ?=
bench: venv
	$(BIN)/python -m bench $(BENCH_ARGS)

# All that a GPU is needed for, in one command. The sanitizer, where the toolkit has none, is PyPI's.
gpu-check: venv
	@! nvidia-smi -L >/dev/null 2>&1 || command -v compute-sanitizer >/dev/null 2>&1 \
		|| $(PIP) nvidia-cuda-sanitizer-api
	$(BIN)/python -m bench gpu-check $(GPU_CHECK_ARGS)

# The same on a machine without one, which may be slow: what needs it is named and left out.
gpu-check-rehearsal: venv
	$(BIN)/python -m bench gpu-check --rehearse --minutes 40

# A visit to a lent GPU as it will be there (bench/visit): with the interpreter of VISIT_PYTHON, which
# is set up as there if it is missing, from a plain copy and without a network.
VISIT_PYTHON ?= build/visit-venv/bin/python
VISIT_PACKAGES ?= .ci/visit.in
VISIT_ARGS ?= --compile
visit-rehearsal:
	@test -x $(VISIT_PYTHON) || { $(PYTHON) -m venv build/visit-venv \
		&& build/visit-venv/bin/python -m pip install --quiet -r $(VISIT_PACKAGES); }
	$(VISIT_PYTHON) -m bench.visit.rehearse $(VISIT_ARGS)

# The README's section on performance, from runs of the models or of a GPU in bench/results.
readme: venv
	$(BIN)/python -m bench readme

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
