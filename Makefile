.PHONY: check test slow bench

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
