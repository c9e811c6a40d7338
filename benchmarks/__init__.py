"""Measurements of fastst-patch and of what it competes with. `python -m benchmarks --help`."""
