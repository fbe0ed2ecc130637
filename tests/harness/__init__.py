"""Programs shared by tests and benchmarks: damaged files, killed commands, sanitizers, C++ checks.

They import `conftest`, so `tests` is on the path: `PYTHONPATH=tests python -m harness.fuzzing`.
"""
