# coinfer: the commands of the project.  `make` alone lists them.

PYTHON ?= python3.11
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= scene-digits
RETRAIN ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow docs bench-main bench-bottleneck bench-pruning bench-pruning-small bench-pipeline bench-runtime chaos soak fuzz results clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(STAMP) ## make .venv with everything (PIP_FLAGS=... is handed to pip)

# Done again only where the requirements have changed since.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[build,test]'
	@touch $@

demo: $(STAMP) ## the whole main job on DATA (scene-digits, or cifar10); RETRAIN=1 trains the network anew
	$(BIN)/coinfer demo --data $(DATA) $(if $(RETRAIN),--retrain) -o out/demo-$(DATA)

test: $(STAMP) ## lint, types, and the fast tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(STAMP) ## trainings to an accuracy and whole-zoo sweeps
	$(BIN)/python -m pytest -m slow

docs: $(STAMP) ## write docs/cli.md anew from --help
	$(BIN)/python -m coinfer.cli.reference > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

bench-main: $(STAMP) ## measure everything in docs/results/main-job.md (hours; needs the data folder)
	$(BIN)/python -m bench.main_job all
	$(BIN)/python -m bench.exactness
	$(BIN)/python -m bench.parts
	$(BIN)/python -m bench.results

bench-bottleneck: $(STAMP) ## measure everything in docs/results/bottleneck.md with the units of zoo/ (an hour)
	$(BIN)/python -m bench.bottleneck prior
	$(BIN)/python -m bench.bottleneck curves
	$(BIN)/python -m bench.bottleneck cells
	$(BIN)/python -m bench.butterfly
	$(BIN)/python -m bench.grid
	$(BIN)/python -m bench.bottleneck_results

bench-pruning: $(STAMP) ## train, prune and measure everything in docs/results/pruning.md (many hours; trainings go on where stopped)
	$(BIN)/python -m bench.pruning train vgg16 resnet18 resnet18-half
	$(BIN)/python -m bench.pruning build vgg16-pruned vgg16-narrow vgg16-shaped resnet18-slim resnet20-pruned
	$(BIN)/python -m bench.pruning cuts vgg16-pruned vgg16-narrow resnet18-slim resnet20-pruned
	$(BIN)/python -m bench.pruning cells
	$(BIN)/python -m bench.pruning cells shaped
	$(BIN)/python -m bench.pruning_results

bench-pruning-small: $(STAMP) ## the same for ResNet-20 alone, in under an hour on two cores
	$(BIN)/python -m bench.pruning build resnet20-pruned
	$(BIN)/python -m bench.pruning cuts resnet20-pruned
	$(BIN)/python -m bench.pruning_results

bench-pipeline: $(STAMP) ## measure everything in docs/results/pipeline.md with the exits of zoo/ (hours)
	$(BIN)/python -m bench.exits resnet56 resnet20
	for name in resnet56-exits resnet20-exits; do \
	  $(BIN)/python -m bench.pipeline build $$name && $(BIN)/python -m bench.pipeline exits $$name || exit 1; done
	for step in streams grid choices; do $(BIN)/python -m bench.pipeline $$step resnet56-exits || exit 1; done
	$(BIN)/python -m bench.queueing resnet56-exits
	$(BIN)/python -m bench.solvers resnet56-exits
	$(BIN)/python -m bench.pipeline_results

bench-runtime: $(STAMP) out/resnet56-units ## recorded links, many devices at one edge, TLS: docs/results/runtime.md, with chaos, soak, fuzz (an hour)
	$(BIN)/python -m bench.traces live
	$(BIN)/python -m bench.traces simulate
	$(BIN)/python -m bench.load
	$(BIN)/python -m bench.tls_overhead
	$(BIN)/python -m bench.runtime_results

out/resnet56-units: | $(STAMP)
	$(BIN)/coinfer build bench/jobs/resnet56-units.toml -o $@

chaos: $(STAMP) out/demo/bundle ## 20,000 requests under faults: none lost, answered twice or wrong (a quarter of an hour)
	$(BIN)/python -m bench.chaos --requests 20000 --seed 0

soak: $(STAMP) out/demo/bundle ## 500,000 requests: memory, descriptors and threads that do not grow (half an hour)
	$(BIN)/python -m bench.soak --requests 500000

out/demo/bundle: | $(STAMP)
	$(BIN)/coinfer demo -o out/demo

fuzz: $(STAMP) ## a million inputs on each parser (messages, payloads, manifests), 20,000 requests on the HTTP front (minutes)
	nice -n 5 $(BIN)/python -m bench.fuzz protocol payloads manifests --inputs 1000000
	nice -n 5 $(BIN)/python -m bench.fuzz_http --requests 20000

results: $(STAMP) ## recompute the tables and JSON of docs/results from the raw logs
	$(BIN)/python -m bench.results
	$(BIN)/python -m bench.bottleneck_results
	$(BIN)/python -m bench.pruning_results
	$(BIN)/python -m bench.pipeline_results
	$(BIN)/python -m bench.runtime_results

clean: ## remove what can be made again, .venv excepted
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
