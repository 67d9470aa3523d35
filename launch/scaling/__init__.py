"""Parts of launch/bench_scaling.py."""
