.PHONY: check test slow bench docs release-check

check:
	ruff check .
	mypy --strict block_recurrent_transformer_pytorch
	python -m pytest

test:
	python -m pytest

slow:
	python -m pytest -m slow

bench:
	python -m benchmarks

docs:
	python -m sphinx -q -W --keep-going -n -b html docs docs/_build/html

release-check:
	scripts/check_release.sh
