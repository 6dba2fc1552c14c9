# One command each: `make help` lists them. Everything runs from the project's own .venv.

PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
BIN := .venv/bin
PREFIX ?= /usr/local
CHECKED := setup.py nydusd workers bench tests scripts/demo scripts/demo-run scripts/run-tests scripts/reference

.PHONY: help setup demo test test-containerd test-fscache lint fuzz torture endurance kill-points bench bench-erofs bench-delays reference install deb clean

help:
	@echo 'make demo    mount an image (of this machine'"'"'s Python library, or of SOURCE=FOLDER or SOURCE=HOST/REPO:TAG), run something from it, compare it'
	@echo 'make test    checks (ruff, mypy --strict) and all tests'
	@echo 'make test-containerd  of these, what containerd and nydus-snapshotter do with the daemon'
	@echo 'make test-fscache  fscache, in a guest kernel under QEMU (the first run on a machine builds the kernel: ten minutes)'
	@echo 'make lint    the checks alone'
	@echo 'make fuzz    at least 100,000 mutated inputs through every parser (FUZZ_INPUTS=N), many orders of events through the router (MODEL_TIMES=N)'
	@echo 'make torture  kill processes of a daemon at random under readers that compare every byte (TORTURE_MINUTES=N, TORTURE_WAY=fuse|fanotify|blobfs)'
	@echo 'make kill-points  kill whoever passes a named point, at each of them in turn; power cuts at each write (KILL_POINTS_MOST=N, KILL_POINTS_SCENE=N)'
	@echo 'make endurance  many upgrades and mounts, after which a daemon must take what it took before'
	@echo 'make install  into PREFIX (/usr/local), below DESTDIR if that is set'
	@echo 'make deb     a Debian package of the same, in dist/'
	@echo 'make reference  write the man pages and shell completions anew'
	@echo 'make bench   figures against the kernel'"'"'s EROFS, and against a reference binary if $$NYDUSD_REF names one'
	@echo 'make bench-erofs   the ways in which the kernel reads images beside the kernel alone, $$NYDUSD_REF as above'
	@echo 'make bench-delays   cold start and cold read at 0, 5, 20 and 100 ms of round trip, $$NYDUSD_REF as above'
	@echo 'make setup   what the others do first: system packages, .venv, pinned libraries'
	@echo 'make clean   remove what the above left in this folder, .venv included'

setup:
	@PYTHON='$(PYTHON)' scripts/setup

demo: setup
	@$(BIN)/python scripts/demo

lint: setup
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

test: lint
	scripts/need-fuse
	scripts/need-registry
	scripts/need-containerd
	scripts/need-erofs
	scripts/need-nbd
	scripts/need-shells
	scripts/need-systemd
	scripts/need-disk
	$(BIN)/python scripts/run-tests

test-containerd: setup
	scripts/need-fuse
	scripts/need-registry
	scripts/need-containerd
	CONTAINERD_READERS=$${CONTAINERD_READERS:-4} $(BIN)/pytest tests/containerd

test-fscache: setup
	$(BIN)/python -m tests.fscache.guest "$$(scripts/need-fscache)"

fuzz: setup
	$(BIN)/python -m tests.fuzz
	MODEL_TIMES=$${MODEL_TIMES:-10} $(BIN)/pytest -q --timeout=0 tests/supervisor/test_router_model.py tests/supervisor/test_shared_model.py

torture: setup
	scripts/need-fuse
	$(BIN)/python -m tests.torture

kill-points: setup
	scripts/need-fuse
	scripts/need-disk
	$(BIN)/python -m tests.killing
	KILL_POINTS=all $(BIN)/pytest -q tests/killing/test_worker_steps.py tests/killing/test_power_cut.py

endurance: setup
	scripts/need-fuse
	$(BIN)/python -m tests.endurance

bench: setup
	scripts/need-fuse
	scripts/need-bench
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.builder

bench-erofs: setup
	scripts/need-fuse
	scripts/need-bench
	$(BIN)/python -m bench.erofs_ways

bench-delays: setup
	scripts/need-fuse
	$(BIN)/python -m bench.delays

install: setup
	PYTHON='$(PYTHON)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' scripts/install

deb: setup
	@PYTHON='$(PYTHON)' scripts/deb

reference: setup
	@$(BIN)/python scripts/reference

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
