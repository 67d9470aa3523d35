"""Modules of launch/bench_table_optimizers.py."""
