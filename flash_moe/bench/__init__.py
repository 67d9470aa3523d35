"""Time, memory and error of the expert op beside its peers, its ceilings and its floor.

    python -m flash_moe.bench --list
    python -m flash_moe.bench --case t4096-k512 zipf --json times.json --plot times.png
    python -m flash_moe.bench --tokens 2048 --hidden-size 512 --num-experts 65536 \\
        --num-experts-per-tok 64 --dtype float32 --against package.module:function

Variants run by turns on the same inputs; each must agree with float64 before its times are
printed. A floor is the least time that the rates measured in the same run allow.
"""
