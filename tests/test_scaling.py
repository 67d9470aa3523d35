"""The scaling benchmark: measurements, predictions, output, files, and invalid options."""

import json
import re
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from ranks import RankPools, rank_device
from small_run import launch

from flash_moe.bench.cases import make_inputs
from flash_moe.ops.naive import naive_expert_func
from flash_moe_dist.dispatch import exact
from flash_moe_dist.dispatch.comm_volume import ElementSizes, PassVolume, bytes_handed
from flash_moe_dist.dispatch.partition import experts_per_rank
from scaling import verify as verify_module
from scaling.arguments import parse, problems_of, variants
from scaling.conventional import conventional_expert_func
from scaling.layer import Layer
from scaling.measure import measure_all, rounds
from scaling.predict import Link, Network, predict
from scaling.problems import Problem
from scaling.rank_group import RankGroup
from scaling.report import Point, ProblemReport, table
from scaling.results import CONVENTIONAL
from scaling.traffic import Collective, Traffic, Transfer, transfers
from scaling.verify import (
    _exact_output,
    largest_row_error,
    results_of_one_device,
    verify,
    verify_all,
)

SMALL = ["--tokens", "12", "--total-tokens", "12", "--hidden-size", "16", "--num-experts", "50"]
SMALL += ["--num-experts-per-tok", "4", "--repeats", "2"]
DISPATCHERS = ["all_to_all", "all_gather"]
WEAK = Problem("weak", 10, 16, 30, 4, "float32", "uniform", 0.0)


def bench(*options: str, ranks: int = 2) -> Any:
    return launch(*options, script="launch/bench_scaling.py", ranks=ranks)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output and files of a run on three ranks."""
    folder = tmp_path_factory.mktemp("scaling")
    written = ("--json", str(folder / "times.json"), "--plot", str(folder / "times.png"))
    routings = ("--routing", "uniform", "one_expert")
    ended = bench(*SMALL, *written, *routings, "--ranks", "2", "3", ranks=3)
    assert ended.returncode == 0, ended.stderr
    return {
        "out": ended.stdout,
        "err": ended.stderr,
        "json": json.loads((folder / "times.json").read_text()),
        "png": (folder / "times.png").read_bytes(),
    }


@pytest.mark.slow
def test_all_variants_have_times_on_all_numbers_of_ranks(files: dict[str, Any]) -> None:
    problems = files["json"]["problems"]
    assert [(one["problem"]["scaling"], one["problem"]["routing"]) for one in problems] == [
        (scaling, routing)
        for scaling in ("weak", "strong")
        for routing in ("uniform", "one_expert")
    ]
    for problem in problems:
        assert [point["ranks"] for point in problem["points"]] == [1, 2, 3]
        alone, *others = problem["points"]
        assert list(alone["results"]) == ["one rank"]
        for point in others:
            assert sorted(point["results"]) == sorted([*DISPATCHERS, CONVENTIONAL])
            assert point["auto"] in DISPATCHERS
            for name, result in point["results"].items():
                assert result["failure"] == ""
                assert len(result["seconds"]["forward"]) == 2
                assert result["error"] < 1e-5
                if name != CONVENTIONAL:
                    assert len(result["seconds"]["backward"]) == 2
                    assert len(result["seconds"]["loop"]) == 3
                    assert (result["peak_bytes"] > 0) == torch.cuda.is_available()
                    phases = ("dispatch", "experts", "combine", "communication", "other")
                    assert list(result["phases"]) == list(phases)
                    assert point["predictions"][name]["communication"] > 0
            assert list(point["predictions"]) == DISPATCHERS


@pytest.mark.slow
def test_efficiencies_are_against_one_rank(files: dict[str, Any]) -> None:
    for problem in files["json"]["problems"]:
        alone = problem["points"][0]["results"]["one rank"]["seconds"]
        for point in problem["points"][1:]:
            seconds = point["results"]["all_to_all"]["seconds"]
            expected = sorted(alone["loop"])[1] / sorted(seconds["loop"])[1]
            if problem["problem"]["scaling"] == "strong":
                expected /= point["ranks"]
            assert point["efficiencies"]["all_to_all"]["loop"] == pytest.approx(expected)


@pytest.mark.slow
def test_more_ranks_are_predicted_and_marked_so(files: dict[str, Any]) -> None:
    for problem in files["json"]["problems"]:
        # Of 12 tokens in all, 64 ranks have none.
        weak = problem["problem"]["scaling"] == "weak"
        assert list(problem["extrapolated"]) == (["8", "64", "512"] if weak else ["8"])
        for predictions in problem["extrapolated"].values():
            assert list(predictions) == DISPATCHERS
            for one in predictions.values():
                parts = ("experts", "memory", "communication")
                assert one["total"] == pytest.approx(sum(one[part] for part in parts))
    lines = [line for line in files["out"].splitlines() if line.split()[:1] in (["64"], ["512"])]
    assert len(lines) == 2 * 2 * 2
    assert all("predicted only" in line for line in lines)
    assert sum("(auto)" in line for line in lines) == len(lines) / 2


@pytest.mark.slow
def test_where_and_progress_and_plot(files: dict[str, Any]) -> None:
    assert torch.__version__ in files["out"].splitlines()[0]
    total = 4 * (1 + 3 + 3) * rounds(2)
    assert f"{total}/{total}" in files["err"]
    assert files["png"].startswith(b"\x89PNG")
    networks = files["json"]["networks"]
    assert list(networks) == ["2", "3"]
    assert all(link["rate"] > 0 for link in networks["3"]["links"].values())
    assert files["json"]["assumed_network"]["ranks_per_host"] == 8
    assert files["json"]["options"]["repeats"] == 2
    assert files["json"]["backend"] == ("nccl" if torch.cuda.is_available() else "gloo")
    assert "50 GB/s between hosts at most" in files["out"]


@pytest.mark.slow
def test_skew_is_predicted_for_more_ranks(files: dict[str, Any]) -> None:
    """Skew lengthens the time of experts: if all use one, its owner has the pairs of all ranks."""
    for problem in files["json"]["problems"]:
        experts = problem["extrapolated"]["8"]["all_to_all"]["experts"]
        seconds = problem["points"][0]["results"]["one rank"]["seconds"]
        alone = sum(sum(seconds[name]) / 2 for name in ("forward", "backward"))
        shared = alone if problem["problem"]["scaling"] == "weak" else alone / 8
        if problem["problem"]["routing"] == "one_expert":
            assert experts == pytest.approx(8 * shared)
        else:
            assert shared <= experts < 4 * shared


@pytest.mark.slow
def test_ranks_that_are_left_out_wait() -> None:
    alone = bench(*SMALL, "--scaling", "weak", "--ranks", "1", ranks=2)
    assert alone.returncode == 0, alone.stderr
    assert "nothing is predicted" in alone.stdout


def test_help_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench_scaling import main

    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", "--help"])
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        main()
    printed = capsys.readouterr().out
    assert printed.count("usage: bench_scaling.py") == 1
    assert "(default: 50.0)" in printed


BAD_OPTIONS = {
    "more ranks than there are": (["--ranks", "3"], "--ranks must be from 1 to the 2 there are"),
    "no tokens": (["--tokens", "0"], "--tokens must be positive, got 0"),
    "tokens that ranks do not divide": (
        ["--total-tokens", "7"],
        "--total-tokens must be a multiple of every number of ranks, got 7 tokens and 2 ranks",
    ),
    "no folder": (["--json", "/nowhere/at/all"], "--json must be a file in a folder that exists"),
    "nothing to compare with": (
        ["--dispatcher", "conventional"],
        "--dispatcher must name one other than conventional",
    ),
    "product keys of a prime": (
        ["--routing", "product_keys", "--num-experts", "31"],
        "--routing product_keys with --num-experts, --num-experts-per-tok: num_experts must have",
    ),
    "key bias without product keys": (["--key-bias", "1"], "--key-bias is for --routing product_k"),
    "no number": (["--network", "nan"], "--network must be positive, got nan"),
    "no latency": (["--latency", "0"], "--latency must be positive, got 0.0"),
    "no picture": (["--plot", "times.txt"], "--plot must end in one of .png, .pdf, .svg, got"),
    "one file for two": (
        ["--plot", "times.png", "--json", "times.png"],
        "--plot and --json must be different files, got times.png for both",
    ),
    "unknown": (["--nonsense"], "unrecognized arguments: --nonsense"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        problems_of(parse("", options, False, 2))


@pytest.mark.parametrize("on_gpus", [False, True])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_defaults_suit_any_number_of_ranks(world_size: int, on_gpus: bool) -> None:
    args = parse("", [], on_gpus, world_size)
    assert {1, world_size} <= set(args.ranks)
    assert len(problems_of(args)) == 4


def test_what_is_measured() -> None:
    chosen = ["auto", "all_to_all", "all_gather", "conventional"]
    few, many = (Problem("weak", 8, 16, 30, slots, "float32", "uniform", 0.0) for slots in (1, 30))
    assert variants(chosen, many, 1) == ["one rank"]
    assert variants(chosen, many, 2) == ["all_gather", "all_to_all", "conventional"]
    assert variants(["auto", "all_gather"], few, 2) == ["all_to_all", "all_gather"]
    args = parse("", ["--tokens", "8", "8", "--scaling", "weak", "weak"], False, 2)
    assert len(problems_of(args)) == 2


@pytest.mark.slow
def test_bad_options_end_every_rank_with_one_message() -> None:
    ended = bench("--ranks", "3")
    assert ended.returncode != 0
    assert ended.stderr.count("bench_scaling.py: error: --ranks must be from 1 to the 2") == 1
    assert 'bench_scaling.py", line' not in ended.stderr, "a traceback hides the message"


def conventional(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The baseline's result, and what it should be."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = make_case(num_tokens + rank, 8, 7, 3, device=rank_device(), seed=rank)
    tables = make_case(1, 8, 7, 1, device=rank_device())
    down_EH, up_EH = tables.down_weights, tables.up_weights
    local = experts_per_rank(7, size)
    own = slice(rank * local, (rank + 1) * local)
    assert dist.group.WORLD is not None
    tokens = (case.indices, case.routing_weights)
    found = conventional_expert_func(
        case.hidden_states, down_EH[own], up_EH[own], *tokens, 7, dist.group.WORLD
    )
    expected = naive_expert_func(case.hidden_states, down_EH, up_EH, *tokens)
    return found, expected.detach()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_the_baseline_is_right(ranks: int, num_tokens: int, rank_pools: RankPools) -> None:
    for found, expected in rank_pools.run(ranks, conventional, num_tokens):
        torch.testing.assert_close(found, expected)


def sharded_layer(problem: Problem) -> tuple[Layer, tuple[torch.Tensor, ...]]:
    assert dist.group.WORLD is not None
    ranks = RankGroup(dist.get_world_size(), dist.group.WORLD, rank_device())
    inputs = make_inputs(problem.case(ranks.size), ranks.device)
    layer = Layer(inputs, ranks)
    return layer, results_of_one_device(inputs, layer)


def verify_a_wrong_one(where: str, problem: Problem) -> None:
    layer, expected = sharded_layer(problem)
    patched: Any = exact
    sum_copies = exact.sum_row_copies
    calls = 0

    def wrong(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        sums_TH = sum_copies(*args)
        # On one rank only. A pass combines twice: outputs, then gradients.
        if dist.get_rank() == 1 and (where == "always" or (where == "second pass" and calls == 3)):
            return sums_TH * 1.1
        if dist.get_rank() == 1 and where == "one row":
            sums_TH[3] = 0
        return sums_TH

    patched.sum_row_copies = wrong
    try:
        verify(layer, expected, "all_to_all")
    finally:
        patched.sum_row_copies = sum_copies


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("always", "rank 1: all_to_all: output has a relative error of 1.0e-01"),
        ("second pass", "rank 1: all_to_all: the output differs from one pass to the next"),
        ("one row", "rank 1: all_to_all: output has a row with a relative error of"),
    ],
)
def test_what_is_wrong_gets_no_time(where: str, message: str, rank_pools: RankPools) -> None:
    # In so many rows, one that is wrong is lost in the error of all.
    many = Problem("weak", 40_000, 8, 4, 2, "bfloat16", "uniform", 0.0)
    problem = many if where == "one row" else WEAK
    for outcome in rank_pools.outcomes(2, verify_a_wrong_one, where, problem):
        assert outcome.kind == "RuntimeError"
        assert outcome.message.startswith(message)


def test_row_errors() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 0.1], [6.0, 8.0]])
    result = exact.clone()
    result[2] += torch.tensor([0.3, 0.4])
    assert largest_row_error(result, exact) == pytest.approx(0.05)
    # Next to nothing where others are large: over the mean row.
    result = exact + torch.tensor([[0.0], [0.1], [0.0]])
    mean = ((25 + 0.01 + 100) / 3) ** 0.5
    assert largest_row_error(result, exact) == pytest.approx(0.02**0.5 / mean, rel=1e-5)


def baseline_without_memory() -> tuple[str, str, dict[str, list[float]]]:
    patched: Any = verify_module
    layer, expected = sharded_layer(WEAK)
    traffic = layer.traffic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patched, "bytes_needed", lambda *_: 2**60)
        results = verify_all(layer, expected, ["all_to_all", CONVENTIONAL], traffic)
    calls = 0

    def advance() -> None:
        nonlocal calls
        calls += 1

    measure_all(layer, results, 2, advance)
    assert calls == 2 * rounds(2)
    alone = Point(1, {"one rank": results["all_to_all"]}, traffic)
    report = ProblemReport(WEAK, 2, False, [alone, Point(2, results, traffic)])
    left_out = results[CONVENTIONAL]
    return left_out.failure, table(report), left_out.seconds


def test_a_baseline_that_does_not_fit_is_left_out(rank_pools: RankPools) -> None:
    for failure, printed, seconds in rank_pools.run(2, baseline_without_memory):
        assert failure.startswith("left out: rows of all pairs take")
        assert failure in printed
        assert seconds == {}


def dispatcher_of_auto(problem: Problem) -> str:
    """Name of the dispatcher that the layer itself uses for "auto"."""
    used: list[str] = []
    layer, _ = sharded_layer(problem)
    layer.choose("auto")
    with pytest.MonkeyPatch.context() as patch:
        for key, one in exact.DISPATCHERS.items():
            rows = one.send_rows

            def noted(*args: Any, name: str = key, rows: Any = rows) -> Any:
                used.append(name)
                return rows(*args)

            patch.setattr(one, "send_rows", noted)
        layer.forward()
    (name,) = used
    return name


@pytest.mark.parametrize(("slots", "dtype"), [(1, "float32"), (2, "bfloat16"), (30, "bfloat16")])
def test_auto_is_that_of_the_layer(slots: int, dtype: str, rank_pools: RankPools) -> None:
    problem = Problem("weak", 10, 16, 30, slots, dtype, "uniform", 0.0)
    assert rank_pools.run(2, dispatcher_of_auto, problem) == [problem.auto(2)] * 2


def traffic_of_two() -> tuple[Traffic, list[list[int]]]:
    layer, _ = sharded_layer(WEAK)
    owners = (layer.tokens.indices_TK // 15).tolist()
    by_hand = [sum(row.count(rank) for row in owners) for rank in range(2)]
    by_hand_rows = [sum(rank in row for row in owners) for rank in range(2)]
    return layer.traffic(), [by_hand, by_hand_rows]


def test_traffic_is_what_ranks_send(rank_pools: RankPools) -> None:
    (traffic, first), (other, second) = rank_pools.run(2, traffic_of_two)
    assert traffic.pairs_WW.tolist() == other.pairs_WW.tolist() == [first[0], second[0]]
    assert traffic.rows_WW.tolist() == other.rows_WW.tolist() == [first[1], second[1]]


@pytest.mark.parametrize("name", DISPATCHERS)
def test_messages_have_the_bytes_of_the_volume_model(name: Any) -> None:
    rows_WW = torch.tensor([[3.0, 5.0, 0.0], [2.0, 2.0, 7.0], [4.0, 0.0, 1.0]])
    pairs_WW = rows_WW * torch.tensor([2.0, 3.0, 1.0])
    widths = ElementSizes(3, 16, 2, 4, 8)
    found = transfers(name, widths, Traffic(rows_WW.double(), pairs_WW.double(), 9))
    for rank in range(3):
        sums = (rows_WW[rank], rows_WW[:, rank], pairs_WW[rank], pairs_WW[:, rank])
        sent, received, pairs_sent, pairs_received = (int(one.sum()) for one in sums)
        load = PassVolume(sent, received, pairs_sent, pairs_received, max_tokens=9)
        expected = sum(sum(one.values()) for one in bytes_handed(name, widths, load))
        handed = sum(
            # An all-gather is handed one copy.
            float(one.bytes_WW[rank].sum()) / (3 if one.collective == "all_gather" else 1)
            for one in found
        )
        assert handed == expected


NETWORK = Network(
    {"all_to_all": Link(1.0, 10.0), "all_gather": Link(2.0, 20.0)},
    ranks_per_host=2,
    between_hosts=5.0,
    memory=1000.0,
)


@pytest.mark.parametrize(
    ("collective", "bytes_WW", "expected"),
    [
        # What a rank keeps does not count; the most that one sends or receives does.
        ("all_to_all", [[80, 10], [40, 80]], 1 + 40 / 10),
        ("all_to_all", [[0, 30, 0, 0], [0] * 4, [0] * 4, [0] * 4], 1 + 30 / 10),
        # To one rank of the other host, from two: at 5 bytes/s.
        ("all_to_all", [[0, 1, 30, 0], [0, 0, 30, 0], [0] * 4, [0] * 4], 1 + 60 / 5),
        ("all_gather", [[40] * 2] * 2, 2 + 40 / 20),
        # 80 bytes of the other host, shared out among the two here.
        ("all_gather", [[40] * 4] * 4, 2 + 40 / 5),
    ],
)
def test_seconds_of_a_transfer(
    collective: Collective, bytes_WW: list[list[int]], expected: float
) -> None:
    transfer = Transfer(collective, torch.tensor(bytes_WW).double())
    assert NETWORK.seconds(transfer) == pytest.approx(expected)


def test_a_prediction_by_hand() -> None:
    """H=16, float32: rows and sums of 64 bytes; 10 tokens a rank, E=30."""
    rows_WW = torch.tensor([[4.0, 6.0], [5.0, 9.0]]).double()
    pairs_WW = torch.tensor([[12.0, 28.0], [10.0, 30.0]]).double()
    traffic = Traffic(rows_WW, pairs_WW, 10)
    found = predict("all_to_all", WEAK, traffic, NETWORK, one_rank_seconds=80.0)
    # The busiest has 58 pairs where the mean has 40.
    assert found.experts == pytest.approx(80 * 58 / 40)
    # The other way 5 rows and 10 pairs cross: fewer. Counts of 48 bytes, 4 a row and 8 a pair,
    # rows, sums; backward rows, sums, weights.
    crossing = 48 + 4 * 6 + 8 * 28 + 64 * 6 + 64 * 6 + 64 * 6 + 64 * 6 + 4 * 28
    assert found.communication == pytest.approx(7 * 1 + crossing / 10)
    # 15 rows received, 14 sent, half of both gradients not written; elements of 4 bytes.
    moved = (15 - 10) * 5 * 4 + 2 * 14 * 3 * 4 - 30 * 4
    assert found.memory == pytest.approx(moved * 16 / 1000)

    gathered = predict("all_gather", WEAK, traffic, NETWORK, one_rank_seconds=80.0)
    crossing = 48 + 4 * 10 + 8 * 28 + 640 + 640 + 4 * 28
    rows = 2 * (2 + 640 / 20)
    assert gathered.communication == pytest.approx(5 * 1 + crossing / 10 + rows)
    moved = (20 - 10) * 5 * 4 + 2 * 20 * 4 - 30 * 4
    assert gathered.memory == pytest.approx(moved * 16 / 1000)


def test_strong_scaling_shares_the_work() -> None:
    strong = Problem("strong", 64, 16, 32, 4, "float32", "uniform", 0.0)
    even = torch.arange(32).view(8, 4)
    traffic = Traffic.extrapolated(even, 32, 8, strong.tokens_per_rank(8))
    assert traffic.pairs_WW.tolist() == [[4.0] * 8] * 8
    assert traffic.rows_WW.tolist() == [[1.0] * 8] * 8
    assert predict("all_gather", strong, traffic, NETWORK, 8.0).experts == pytest.approx(1.0)
    assert predict("all_gather", WEAK, traffic, NETWORK, 8.0).experts == pytest.approx(8.0)
    # Of 8 tokens a rank 56 more are received and 64 sums sent; a share of the gradients of
    # tables is in a share of the time on one rank.
    moved = 56 * 5 * 4 + 2 * 64 * 4
    memory = predict("all_gather", strong, traffic, NETWORK, 8.0).memory
    assert memory == pytest.approx(moved * 16 / 1000)


def exact_of(indices: list[list[int]]) -> None:
    case = make_case(3, 8, 7, 2, torch.float64)
    rows = (case.hidden_states, case.down_weights, case.up_weights)
    found = _exact_output(*rows, torch.tensor(indices), case.routing_weights)
    expected = naive_expert_func(*rows, torch.tensor(indices), case.routing_weights)
    torch.testing.assert_close(found, expected.detach())


def test_the_op_on_one_device_is_held_against_another_formula(rank_pools: RankPools) -> None:
    exact_of([[0, 5], [-1, 5], [6, -1]])
    exact_of([[-1, -1]] * 3)
    for outcome in rank_pools.outcomes(2, wrong_on_one_device):
        assert outcome.kind == "RuntimeError"
        assert "one device: output has a relative error of 1.0e-01" in outcome.message


def wrong_on_one_device() -> None:
    patched: Any = verify_module
    right = patched.triton_flash_expert_func
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patched, "triton_flash_expert_func", lambda *a: 1.1 * right(*a))
        sharded_layer(WEAK)
