# Every target does its own set-up first: tools/setup finds out what is missing, quickly when nothing is.
# ARGS is handed to pytest, the demo or one benchmark: make unit ARGS="-k codec"

PATH := $(PATH):/usr/sbin:/sbin
export PATH

PYTHON3 := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-vm unit bench lint format build criu docs clean

# Each with the document that it refreshes.
BENCHMARKS := "limits --readme docs/benchmarks.md" "lazy_pages --readme README.md" \
	"scale --readme docs/scale.md --picture benchmarks/pictures/scale.svg" \
	"links --readme README.md" "page_server --readme README.md" rpc \
	"containers --readme docs/tutorials/with-runc.md" \
	"hybrid --readme docs/how-to/pre-copy.md --picture benchmarks/pictures/hybrid.svg"

help:
	@echo "make demo    migrate a process and watch it happen"
	@echo "make test    run every test"
	@echo "make test-vm run those that need virtual machines, in some minutes: old kernel and CRIU, pre-copy, two hosts"
	@echo "make unit    run the quick tests, which need neither CRIU nor root"
	@echo "make bench   measure everything and refresh the README's numbers, in half an hour"
	@echo "             (ARGS=\"--case random --rounds 3\": some cases of lazy_pages only, and change no file)"
	@echo "make lint    check style and types"
	@echo "make format  let ruff format the sources"
	@echo "make build   only set up .venv and build"
	@echo "make criu    only fetch CRIUs, and say where they are"
	@echo "make docs    make the documentation and the man pages, in build/docs"
	@echo "make clean   remove what was built (not what is in the cache: CRIUs, a root file system)"

demo:
	@tools/setup build criu
	@$(PYTHON3) -m criupy.testing.demo $(ARGS)

test:
	@tools/setup
	@$(PYTHON3) -m pytest $(ARGS)

test-vm:
	@tools/setup build criu root vm
	@$(PYTHON3) -m pytest tests/vm $(ARGS)

unit: build
	@$(PYTHON3) -m pytest -m "not criu and not slow" $(ARGS)

bench:
	@tools/setup build criu root vm
ifdef ARGS
	@$(PYTHON3) benchmarks/lazy_pages.py $(ARGS)
else
	@for each in $(BENCHMARKS); do \
		set -- $$each; name=$$1; shift; echo "bench: $$name"; \
		$(PYTHON3) benchmarks/$$name.py --json benchmarks/$$name.json "$$@" || exit 1; \
	done
endif

lint: build
	@failed=; \
	for check in "ruff check" "ruff format --check" mypy; do \
		echo "$$check"; $(PYTHON3) -m $$check || failed="$$failed '$$check'"; \
	done; \
	[ -z "$$failed" ] || { echo "lint: failed:$$failed" >&2; exit 1; }

format: build
	$(PYTHON3) -m ruff format
	$(PYTHON3) -m ruff check --fix

build:
	@tools/setup build

criu:
	@tools/setup criu
	@for each in /var/cache/criupy "$${XDG_CACHE_HOME:-$$HOME/.cache}/criupy"; do \
		for found in "$$each"/criu-*/bin; do [ ! -x "$$found/criu" ] || echo "export PATH=$$found:\$$PATH"; done; \
	done

docs: build
	@for builder in html man; do \
		$(PYTHON3) -m sphinx -q -W --keep-going -n -b $$builder -d build/doctrees docs build/docs/$$builder || exit 1; \
	done
	@echo "docs: build/docs/html/index.html, and man -l build/docs/man/criupy-lazy-pages.1"

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +
