# Every target calls the one before it when its result is missing: `make demo` and `make test`
# work on a fresh clone. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-protos
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench protos protos-check lint types imports clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## make .venv with everything the project needs

# torch comes first and alone: the pin selects the build that the index offers for this machine.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## all three stages of RLHF on the small world, from nothing, on the CPU
	$(BIN)/kleash demo

test: check  ## every check and every test that this machine can run
	$(BIN)/python -m pytest

check: lint types imports protos-check  ## linters, types, layer contracts, generated code

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd protos && ../$(BIN)/buf lint

types: $(STAMP)
	$(BIN)/pyright

imports: $(STAMP)
	$(BIN)/lint-imports

bench: $(STAMP)  ## the benchmarks, quickly; full runs are described in benchmarks/README.md
	$(BIN)/python benchmarks/ppo_step.py --quick
	$(BIN)/python benchmarks/weights.py --quick

# The generator needs protobuf < 7, the runtime takes 6 and 7: it lives in an environment of its own.
$(PROTO_VENV)/.installed:
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet grpcio-tools==1.73.1 'protobuf<7' 'setuptools<81'
	touch $@

protos: $(PROTO_VENV)/.installed  ## generate the protobuf code
	cd protos && ../$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
		$$(find kleash -name '*.proto' | sort)

protos-check: $(PROTO_VENV)/.installed  ## fail when the committed generated code is stale
	rm -rf build/protos && mkdir -p build/protos
	cd protos && ../$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I . --python_out=../build/protos \
		--pyi_out=../build/protos --grpc_python_out=../build/protos $$(find kleash -name '*.proto' | sort)
	diff -r --exclude='*.proto' --exclude=buf.yaml --exclude=__pycache__ build/protos/kleash protos/kleash \
		|| { echo 'generated code is stale: run make protos and commit the result'; exit 1; }

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(PROTO_VENV) build dist
