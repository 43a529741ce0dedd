# A fresh clone needs Python 3.11 and make; every target fetches what else it needs, once.
# More words for the program behind a target: make test ARGS='tests/transport/test_codec.py -x'

.PHONY: help demo test verify bench kernels lint site refresh clean

# Without compiled files every program that a test starts would compile the packages again.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo 'make demo    two allocations from request to release, on this machine, checked'
	@echo 'make test    the tests, on up to four cores; as root also what needs real namespaces'
	@echo 'make verify  what takes longer: a quarter of the verification campaign, with a report'
	@echo 'make bench   what it costs, beside a C floor and other programs; as root, four minutes'
	@echo 'make kernels the demo and some tests on other kernels, in QEMU; as root, takes an hour'
	@echo 'make lint    ruff, ruff format and mypy --strict'
	@echo 'make site    the book of specs/ as a web site, build/site/index.html'
	@echo 'make refresh the generated parts of specs/ anew, after a change of the code'
	@echo 'make clean   remove the environment and everything generated'
	@echo "ARGS='...' is handed on; PYTHON=... chooses the interpreter for .venv"

demo:
	@.ci/setup demo
	.venv/bin/nshandoff demo $(ARGS)

test:
	@.ci/setup test
	.venv/bin/pytest -n auto --dist worksteal -m 'not deep' $(ARGS)

verify:
	@.ci/setup test
	.venv/bin/nshandoff verify --scale 0.25 $(ARGS)

bench:
	@.ci/setup bench
	.venv/bin/python -m bench $(ARGS)

kernels:
	.ci/kernels $(ARGS)

lint:
	@.ci/setup lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

site:
	@.ci/setup site
	rm -rf build/site
	.venv/bin/python -m sphinx -qEW --keep-going -d build/doctrees -c specs/_build $(ARGS) specs build/site

refresh:
	@.ci/setup demo
	.venv/bin/python -m specs._build.refresh $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .verify .*_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
