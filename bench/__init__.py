"""Benchmarks: each compares two sides, interleaved in one run. `python -m bench --list` names them."""
