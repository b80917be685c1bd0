"""The benchmark: this gateway beside what people write by hand, on one core each. `python -m tests.bench --help`"""
