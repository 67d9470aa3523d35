"""The benchmark: what it prints, what it refuses, and the memory that it shows."""

import pytest
import torch
from torch import Tensor

from flash_moe import bench
from flash_moe.ops.naive import naive_expert_func

OPTIONS = ["--tokens", "6", "--hidden-size", "16", "--num-experts", "40"]
OPTIONS += ["--num-experts-per-tok", "3", "--repeats", "2"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(OPTIONS)
    printed = capsys.readouterr().out
    assert (
        f"T, H, E, K = (6, 16, 40, 3), float32, {'cuda' if torch.cuda.is_available() else 'cpu'}"
        in printed
    )
    assert f"torch {torch.__version__}" in printed
    for row in ("forward, flash_moe", "backward, gather and matmul"):
        assert printed.count(row) == 1


def test_no_time_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: Tensor) -> Tensor:
        return naive_expert_func(*args) * 1.001

    monkeypatch.setitem(bench.VARIANTS, "flash_moe", wrong)
    with pytest.raises(RuntimeError, match=r"flash_moe is wrong: relative error 1\.0e-03"):
        bench.main(OPTIONS)
    assert "median ms" not in capsys.readouterr().out


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, message in (
        ("--repeats", "1", "--repeats must be at least 2, got 1"),
        ("--tokens", "0", "--tokens must be positive, got 0"),
    ):
        with pytest.raises(SystemExit):
            bench.main([option, value])
        assert message in capsys.readouterr().err


def test_cpu_path_takes_under_a_tenth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
    inputs = bench.make_inputs(1024, 512, 16384, 64, torch.float32, "cpu")
    gathered = 1024 * 64 * 512 * 4
    extra: dict[str, int] = {}
    for name, func in bench.VARIANTS.items():
        for _ in range(2):
            extra[name] = max(bench.one_pass(inputs, func, measure_memory=True)[2].values())
    assert extra["gather and matmul"] > gathered
    assert extra["flash_moe"] < extra["gather and matmul"] / 10
