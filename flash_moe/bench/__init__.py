"""Benchmark of the expert op on one device: time, memory and error, next to baselines.

    python -m flash_moe.bench --list
    python -m flash_moe.bench --case t4096-k512 zipf --json times.json --plot times.png
    python -m flash_moe.bench --tokens 2048 --hidden-size 512 --num-experts 65536 \\
        --num-experts-per-tok 64 --dtype float32 --against package.module:function
    python -m flash_moe.bench --router --tokens 16384 --num-experts 250000

Repeats of the variants are interleaved and use the same inputs. A variant gets a time only if its
result agrees with a float64 reference. The roofline time of a pass is the least time that the
device rates measured in the same run allow.
"""
