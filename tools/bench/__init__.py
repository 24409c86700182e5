"""Benchmarks: measurements as ratios within one run, so that the machine's mood cancels."""
