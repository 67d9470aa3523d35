"""The benchmark: output, files, invalid options, roofline times, and measured memory."""

import gc
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_moe.bench import baselines, router
from flash_moe.bench.__main__ import main, parse
from flash_moe.bench.baselines import (
    elementwise_expert_func,
    embedding_bag_expert_func,
    variants,
)
from flash_moe.bench.cases import CASES, Case, Inputs, make_inputs
from flash_moe.bench.device_rates import DeviceRates, GatherShape, sum_rows
from flash_moe.bench.measure import (
    PeakMemory,
    exact_results,
    measure,
    one_pass,
    relative_error,
)
from flash_moe.bench.roofline import launch_bound, pairs_per_expert, roofline_time
from flash_moe.ops.naive import naive_expert_func
from flash_moe.ops.product_keys import product_key_topk

OPTIONS = ["--tokens", "6", "--hidden-size", "16", "--num-experts", "40"]
OPTIONS += ["--num-experts-per-tok", "3", "--repeats", "2"]
CPU = torch.device("cpu")
H200 = DeviceRates(copy=4.27e12, gather=9.5e12, matrix=650e12)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
    # Without a compiler torch.compile is left out: it would take longer than all the rest.
    monkeypatch.setenv("CXX", "no-such-compiler")


def wrong(*args: Tensor) -> Tensor:
    return naive_expert_func(*args) * 1.001


def raising(*args: Tensor) -> Tensor:
    raise NotImplementedError("not on Tuesdays\nnor on others")


def exhausting(*args: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def error_of(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("on_the_cpu")
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(OPTIONS) == 0
    printed = capsys.readouterr().out
    assert "T, H, E, K = (6, 16, 40, 3), float32, uniform, cpu" in printed
    assert f"torch {torch.__version__}" in printed
    assert "torch.compile left out: no C++ compiler (no-such-compiler) found" in printed
    for row in ("forward, flash_moe", "backward, gather and matmul", "backward roofline"):
        assert printed.count(row) == 1
    assert printed.count("forward, bmm and embedding_bag") == 1


@pytest.mark.usefixtures("on_the_cpu")
def test_no_time_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baselines, "triton_flash_expert_func", wrong)
    with pytest.raises(RuntimeError, match=r"flash_moe is wrong: relative error 1\.0e-03"):
        main(OPTIONS)
    assert "median ms" not in capsys.readouterr().out


@pytest.mark.usefixtures("on_the_cpu")
def test_failing_op_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "triton_flash_expert_func", exhausting)
    with pytest.raises(torch.OutOfMemoryError):
        main(OPTIONS)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_failing_baselines_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    failing = [f"--against=test_bench:{name}" for name in ("wrong", "raising", "exhausting")]
    right = "flash_moe.ops.naive:naive_expert_func"
    assert main([*OPTIONS, "--no-baselines", *failing, "--against", right]) == 1
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = {line[1]: [cell.strip() for cell in line[2:] if cell] for line in lines[3:]}
    assert not any("gather and matmul" in name for name in cells)
    for direction in ("forward", "backward"):
        assert len(cells[f"{direction}, {right}"]) == 7
        assert cells[f"{direction}, test_bench:wrong"] == [
            "test_bench:wrong is wrong: relative error 1.0e-03 of the output"
        ]
        assert cells[f"{direction}, test_bench:raising"] == ["not on Tuesdays"]
        assert cells[f"{direction}, test_bench:exhausting"] == ["out of memory"]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("name", "status"), [("wrong", 1), ("missing", 2)])
def test_exit_status_with_a_function_of_ones_own(
    name: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["", *OPTIONS, "--no-baselines", f"--against=test_bench:{name}"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("flash_moe.bench", run_name="__main__")
    assert ended.value.code == status


@pytest.mark.usefixtures("on_the_cpu")
def test_no_peers_is_the_old_name_of_no_baselines() -> None:
    assert parse(OPTIONS)[0].baselines
    assert not parse([*OPTIONS, "--no-baselines"])[0].baselines
    assert not parse([*OPTIONS, "--no-peers"])[0].baselines


ROUTER = ["--router", "--tokens", "6", "--num-experts", "40", "--repeats", "2"]
ROUTER += ["--num-experts-per-tok", "7"]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "router.json"
    assert main([*ROUTER, "--dtype", dtype, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"router: T, E, K = (6, 40, 7), keys (5, 8), {dtype}, cpu" in printed
    for directions in ("forward", "backward", "forward + backward"):
        for name in (router.OURS, router.PLAIN):
            assert printed.count(f"  {directions}, {name} ") == 1
    written = json.loads(file.read_text())
    assert written["case"]["num_experts_per_tok"] == 7
    for result in written["results"].values():
        assert [len(seconds) for seconds in result["seconds"].values()] == [2, 2]


def rotated(experts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return experts.roll(1, 1), scores


def repeated(experts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return experts[:, :1].expand_as(experts), scores


def worse(experts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    least = next(one for one in range(40) if one not in experts[0])
    experts = experts.clone()
    experts[0, -1] = least
    return experts, scores


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rotated, "product_key_topk is wrong: relative error"),
        (repeated, "an expert was chosen twice for a token"),
        (worse, "product_key_topk is wrong: a chosen sum is .* below the best"),
    ],
)
def test_no_time_for_a_router_with_wrong_experts(
    change: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = product_key_topk
    monkeypatch.setattr(router, "product_key_topk", lambda *args: change(*right(*args)))
    with pytest.raises(RuntimeError, match=message):
        main(ROUTER)
    assert "median ms" not in capsys.readouterr().out


def test_options_that_the_router_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--routing", "zipf", "--case", "cpu", "--no-baselines"]
    assert "--router cannot be combined with --case, --routing, --no-baselines" in error_of(
        [*ROUTER, *options], capsys
    )
    assert "num_experts_per_tok must be at most num_experts = 5, got 7" in error_of(
        [*ROUTER, "--num-experts", "5"], capsys
    )


def far_off(*args: Tensor) -> Tensor:
    return naive_expert_func(*args) * 1.2


@pytest.mark.usefixtures("on_the_cpu")
def test_a_baseline_in_16_bits_may_not_be_far_off(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*OPTIONS, "--dtype", "bfloat16", "--no-baselines"]
    assert main([*options, "--against=test_bench:far_off"]) == 1
    assert capsys.readouterr().out.count("test_bench:far_off is wrong: relative error 2.0e-01") == 2


class LaterWrong:
    """A function whose first result is right, and all later ones are wrong."""

    calls = 0

    def __call__(self, *args: Tensor) -> Tensor:
        self.calls += 1
        return naive_expert_func(*args) * (1 if self.calls == 1 else 1.001)


def test_no_time_for_what_is_wrong_later() -> None:
    inputs = make_inputs(Case("small", 6, 16, 40, 3, "float32"), CPU)
    results = measure(inputs, {"flash_moe": naive_expert_func, "later": LaterWrong()}, repeats=2)
    assert results["later"].failure == "later is wrong: relative error 1.0e-03 of the output"
    assert not any(results["later"].seconds.values())
    assert all(len(seconds) == 2 for seconds in results["flash_moe"].seconds.values())


def writing(hidden: Tensor, down: Tensor, up: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    out = naive_expert_func(hidden, down, up, indices.clone(), weights)
    indices.zero_()
    return out


def test_a_baseline_that_writes_to_its_inputs_ends_the_run() -> None:
    inputs = make_inputs(Case("small", 6, 16, 40, 3, "float32"), CPU)
    with pytest.raises(RuntimeError, match="writing writes to its inputs"):
        measure(inputs, {"flash_moe": naive_expert_func, "writing": writing}, repeats=2)


@pytest.mark.usefixtures("on_the_cpu")
def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ("--repeats 1", "--repeats must be at least 2, got 1"),
        ("--tokens 0", "--tokens must be positive, got 0"),
        ("--case none", "--case must be a name that --list prints, got 'none'"),
        ("--case all", "--case all needs a CUDA device"),
        (
            "--case zipf --tokens 3",
            "--case sets shape and routing, it cannot be combined with --tokens",
        ),
        ("--key-bias 1", "key_bias is for routing product_keys, got uniform"),
        (
            "--routing product_keys --num-experts 65",
            "num_experts must have two factors within a factor of 2 with product keys, "
            "got 65 = 5 * 13",
        ),
        (
            "--routing product_keys --num-experts 4 --num-experts-per-tok 5",
            "num_experts_per_tok must be at most num_experts = 4 with product keys, got 5",
        ),
        ("--json /no/such/b.json", "--json must be in a folder that exists, got /no/such/b.json"),
        ("--against naive", "expected package.module:function, got 'naive'"),
        ("--against no.such:f", "cannot import 'no.such': ModuleNotFoundError"),
        ("--against flash_moe.ops.naive:f", "'f' of module 'flash_moe.ops.naive' does not exist"),
        ("--against test_bench:OPTIONS", "'OPTIONS' of module 'test_bench' is not callable"),
    ):
        assert message in error_of(options.split(), capsys)


@pytest.mark.usefixtures("on_the_cpu")
def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--plot needs matplotlib" in error_of(["--plot", "b.png"], capsys)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(CASES) == 26
    assert "t1024-k4096       T, H, E, K = (1024, 1024, 102400, 4096), bfloat16, uniform" in printed
    for name in ("million", "product-keys-0.5", "t1-k512", "h8192", "cpu"):
        assert any(line.split()[0] == name for line in printed)


def ids_of(routing: str, key_bias: float = 0.0) -> Tensor:
    case = Case("", 300, 4, 400, 30, "float32", routing, key_bias)
    ids = make_inputs(case, CPU).indices
    assert ids.shape == (300, 30)
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < 400
    return ids


def test_routings() -> None:
    assert pairs_per_expert(ids_of("uniform"), 400).max() < 60
    assert torch.equal(ids_of("one_expert"), torch.full((300, 30), 200))
    zipf = pairs_per_expert(ids_of("zipf"), 400).double() / 9000
    harmonic = (1 / torch.arange(1, 401, dtype=torch.float64)).sum()
    # The three most used; five standard deviations.
    for rank, share in enumerate(zipf.sort(descending=True).values[:3].tolist(), start=1):
        expected = float(1 / rank / harmonic)
        assert abs(share - expected) < 5 * (expected / 9000) ** 0.5
    loads = []
    for bias in (0.0, 1.0, 2.0):
        ids = ids_of("product_keys", bias)
        assert all(len(row.unique()) == 30 for row in ids)
        loads.append(int(pairs_per_expert(ids, 400).max()))
    assert loads[0] < 60 < loads[1] < loads[2] <= 300


def test_product_keys_are_the_best_sums() -> None:
    # Biases so large that all tokens agree: the best sums of the two axes' biases.
    case = Case("", 3, 4, 12, 5, "float32", "product_keys", 1e6)
    ids = make_inputs(case, CPU).indices
    draw = torch.Generator().manual_seed(0)
    for shape in ((3, 4), (12, 4), (12, 4), (3, 5)):
        torch.randn(shape, generator=draw)
    rows, columns = (torch.randn(side, generator=draw) for side in (3, 4))
    best = (rows[:, None] + columns).flatten().topk(5).indices
    assert torch.equal(ids, best.expand(3, 5))


def test_exact_results_equal_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two tokens at a time, the last alone.
    monkeypatch.setitem(exact_results.__globals__["EXACT_ELEMENTS"], "cpu", 2 * 5 * 8)
    inputs = make_inputs(Case("", 7, 8, 20, 5, "float32"), CPU)
    inputs.indices[0, 1] = inputs.indices[3] = -1
    inputs.indices[5] = 4
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    doubles = Inputs((leaves[0], leaves[1], leaves[2], leaves[3]), inputs.indices, inputs.grad)
    out = doubles.call(naive_expert_func)
    expected = (out, *torch.autograd.grad(out, leaves, inputs.grad.double()))
    for result, right in zip(exact_results(inputs), expected, strict=True):
        torch.testing.assert_close(result, right.detach(), rtol=1e-13, atol=1e-13)


def test_baselines_are_right() -> None:
    inputs = make_inputs(Case("", 7, 8, 20, 5, "float32"), CPU)
    exact = exact_results(inputs)
    for func in (elementwise_expert_func, embedding_bag_expert_func):
        results, _ = one_pass(inputs, func, lambda work: (work(), None))
        for pair in zip(results, exact, strict=True):
            assert relative_error(*pair) < 1e-6


def test_relative_error() -> None:
    exact = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert relative_error(torch.tensor([[3.0, 4.5]]), exact) == pytest.approx(0.1)
    assert relative_error(torch.tensor([[3.0, float("nan")]]), exact) == float("inf")
    with pytest.raises(ValueError, match=r"result must have shape \(1, 2\), got \(2,\)"):
        relative_error(exact[0], exact)


def test_gather_rate_reads_all_rows(device: torch.device) -> None:
    table = torch.arange(20 * 32, device=device, dtype=torch.int32).view(20, 32)
    ids = torch.randint(20, (3, 16), device=device, dtype=torch.int32)
    sums = sum_rows(table, ids, GatherShape(pairs=8, rows=4, block_words=16, warps=1))
    expected = table[ids.long()].view(3, 2, -1).sum(-1)
    assert sums.tolist() == expected.tolist()


def uniform_rooflines(tokens: int, hidden_size: int, experts: int, slots: int, touched: int) -> str:
    """Milliseconds in bf16 on an H200, with the pairs spread evenly over the touched experts."""
    loads = torch.zeros(experts, dtype=torch.float64)
    loads[:touched] = tokens * slots / touched
    both = roofline_time(loads, tokens, hidden_size, 2, H200)
    return ", ".join(f"{time.uniform * 1e3:.3f}" for time in both.values())


def test_roofline_times() -> None:
    # By hand: 2 * 4096 * 512 * 1024 * 2 / 9.5e12 and twice that.
    assert uniform_rooflines(4096, 1024, 102_400, 512, 102_400) == "0.904, 1.808"
    # 4 * 1024 * 102,400 * 1024 / 650e12.
    assert uniform_rooflines(1024, 1024, 102_400, 4096, 102_400) == "0.661, 1.322"
    # 2 * 412,600 * 2048 * 2 / 4.27e12, and 2 * 1,048,576 * 2048 * 2 / 4.27e12 more.
    assert uniform_rooflines(8192, 2048, 1_048_576, 64, 412_600) == "0.792, 2.803"
    assert launch_bound(1e-4, 5) == pytest.approx(2.5e-4)


def test_hot_cold_roofline_time() -> None:
    loads = torch.tensor([4000, 10, 0, 0])
    forward, backward = roofline_time(loads, 4096, 1024, 2, H200).values()
    # A product for the first, 10 gathers for the second.
    hot_cold = 4 * 4096 * 1024 / 650e12 + 10 * 2 * 1024 * 2 / 9.5e12
    assert forward.hot_cold == forward.skewed == pytest.approx(hot_cold)
    assert backward.hot_cold == pytest.approx(2 * hot_cold)
    assert forward.gather == pytest.approx(4010 * 2 * 1024 * 2 / 9.5e12)
    # For one token, reading the rows from memory takes longer than products.
    assert roofline_time(loads, 1, 1024, 2, H200)["forward"].skewed == 2 * 2 * 1024 * 2 / 4.27e12


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_json_and_plot(tmp_path: Path) -> None:
    options = ["--tokens=5", "--hidden-size=8", "--num-experts=9", "--num-experts-per-tok=2"]
    options += ["--routing=product_keys", "--key-bias=1.5", "--repeats=3", "--dtype=bfloat16"]
    options += ["--against=test_bench:raising"]
    options += [f"--json={tmp_path / 'b.json'}", f"--plot={tmp_path / 'b.png'}"]
    main(options)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["command"] == options
    assert written["versions"]["torch"] == torch.__version__
    (case,) = written["cases"]
    assert case["case"]["tokens"] == 5
    assert (case["case"]["routing"], case["case"]["key_bias"]) == ("product_keys", 1.5)
    assert case["device"]["type"] == "cpu"
    assert case["device_rates"]["copy"] == case["device_rates"]["gather"] > 1e8
    forward = case["roofline_times"]["forward"]
    assert forward["roofline"] >= forward["hbm"] > 0
    assert case["results"]["test_bench:raising"]["failure"] == "not on Tuesdays"
    for name in ("flash_moe", "gather and matmul"):
        result = case["results"][name]
        assert len(result["seconds"]["forward"]) == len(result["seconds"]["backward"]) == 3
        assert result["errors"]["backward"] > 0
        assert result["extra_bytes"]["forward"] >= 0


@pytest.mark.slow
def test_cpu_path_takes_under_a_tenth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
    inputs = make_inputs(Case("", 1024, 512, 16384, 64, "float32"), CPU)
    gathered = 1024 * 64 * 512 * 4
    funcs, _ = variants(CPU, with_baselines=True, against={})
    extra: dict[str, int] = {}
    for name in ("flash_moe", "gather and matmul"):
        for _ in range(2):
            gc.collect()
            extra[name] = max(one_pass(inputs, funcs[name], PeakMemory(CPU))[1].values())
    assert extra["gather and matmul"] > gathered
    assert extra["flash_moe"] < extra["gather and matmul"] / 10
