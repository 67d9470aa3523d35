"""Modules of launch/bench_scaling.py."""
