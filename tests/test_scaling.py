"""The scaling benchmark: what it measures, predicts, prints, writes and refuses."""

import json
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from ranks import RankPools, rank_device
from small_run import launch

from flash_moe.bench.cases import make_inputs
from flash_moe.ops.naive import naive_expert_func
from flash_moe_dist import dispatch
from flash_moe_dist.sharding import experts_per_rank
from flash_moe_dist.volume import Load
from scaling.arguments import parse, problems_of
from scaling.conventional import conventional_expert_func
from scaling.layer import Layer
from scaling.measure import CONVENTIONAL, measure_all, verify_all
from scaling.predict import Link, Network, predict, predict_even
from scaling.problems import Problem
from scaling.ranks import Ranks
from scaling.report import Point, ProblemReport, table
from scaling.verify import results_of_one_device

SMALL = ["--tokens", "12", "--total-tokens", "12", "--hidden-size", "16", "--num-experts", "50"]
SMALL += ["--num-experts-per-tok", "4", "--repeats", "2"]
DISPATCHERS = ["auto", "all_to_all", "all_gather"]
WEAK = Problem("weak", 10, 16, 30, 4, "float32", "uniform", 0.0)


def bench(*options: str, ranks: int = 2) -> Any:
    return launch(*options, script="launch/bench_scaling.py", ranks=ranks)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on three ranks prints and writes."""
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
        assert list(alone["results"]) == ["auto"]
        for point in others:
            assert list(point["results"]) == [*DISPATCHERS, CONVENTIONAL]
            for name, result in point["results"].items():
                assert result["failure"] == ""
                assert len(result["seconds"]["forward"]) == 2
                assert result["error"] < 1e-5
                if name != CONVENTIONAL:
                    assert len(result["seconds"]["backward"]) == 2
                    assert len(result["seconds"]["loop"]) == 1
                    assert result["peak_bytes"] > 0
                    steps = ("dispatch", "experts", "combine", "communication", "other")
                    assert list(result["steps"]) == list(steps)
                    assert point["predictions"][name]["communication"] > 0
            assert list(point["predictions"]) == DISPATCHERS


def test_efficiencies_are_against_one_rank(files: dict[str, Any]) -> None:
    for problem in files["json"]["problems"]:
        alone = problem["points"][0]["results"]["auto"]["seconds"]
        for point in problem["points"][1:]:
            seconds = point["results"]["all_to_all"]["seconds"]
            # The median of one.
            expected = alone["loop"][0] / seconds["loop"][0]
            if problem["problem"]["scaling"] == "strong":
                expected /= point["ranks"]
            found = problem["efficiencies"][str(point["ranks"])]["all_to_all"]["loop"]
            assert found == pytest.approx(expected)


def test_more_ranks_are_predicted_and_marked_so(files: dict[str, Any]) -> None:
    for problem in files["json"]["problems"]:
        assert list(problem["extrapolated"]) == ["8", "64", "512"]
        for predictions in problem["extrapolated"].values():
            assert list(predictions) == DISPATCHERS[1:]
    lines = [line for line in files["out"].splitlines() if line.split()[:1] in (["64"], ["512"])]
    assert len(lines) == 4 * 2 * 2
    assert all("predicted only" in line for line in lines)


def test_where_and_progress_and_plot(files: dict[str, Any]) -> None:
    assert torch.__version__ in files["out"].splitlines()[0]
    assert "36/36" in files["err"]
    assert files["png"].startswith(b"\x89PNG")
    networks = files["json"]["networks"]
    assert [network["ranks_per_host"] for network in networks] == [1, 2, 3, 8]
    assert all(link["rate"] > 0 for link in networks[-1]["links"].values())


BAD_OPTIONS = {
    "more ranks than there are": (["--ranks", "3"], "--ranks must be from 1 to the 2 there are"),
    "no tokens": (["--tokens", "0"], "--tokens must be positive, got 0"),
    "tokens that ranks do not divide": (
        ["--total-tokens", "7"],
        "--total-tokens must divide by every number of ranks, got 7 tokens and 2 ranks",
    ),
    "no folder": (["--json", "/nowhere/at/all"], "--json must be a file in a folder that exists"),
    "nothing to compare with": (
        ["--dispatcher", "conventional"],
        "--dispatcher conventional needs another one",
    ),
    "product keys of a prime": (
        ["--routing", "product_keys", "--num-experts", "31"],
        "product keys need a number of experts with two factors near each other",
    ),
    "unknown": (["--nonsense"], "unrecognized arguments: --nonsense"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        problems_of(parse("", options, torch.device("cpu"), 2))


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
    ranks = Ranks(dist.get_world_size(), dist.group.WORLD, rank_device())
    inputs = make_inputs(problem.case(ranks.size), ranks.device)
    layer = Layer(inputs, ranks)
    return layer, results_of_one_device(inputs, layer)


def verify_a_wrong_one(where: str) -> None:
    layer, expected = sharded_layer(WEAK)
    patched: Any = dispatch
    sum_copies = dispatch.sum_copies
    calls = 0

    def wrong(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        # A pass combines twice: outputs, then gradients.
        factor = 1.001 if where == "always" or calls == 3 else 1.0
        # On one rank only.
        return sum_copies(*args) * (factor if dist.get_rank() else 1.0)

    patched.sum_copies = wrong
    try:
        verify_all(layer, expected, ["all_to_all"])
    finally:
        patched.sum_copies = sum_copies


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("always", "rank 1: all_to_all: relative error 1.0e-03 of the output"),
        ("second pass", "rank 1: all_to_all: the output differs from one pass to the next"),
    ],
)
def test_what_is_wrong_gets_no_time(where: str, message: str, rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, verify_a_wrong_one, where):
        assert (outcome.kind, outcome.message) == ("RuntimeError", message)


def baseline_without_memory() -> tuple[str, str, dict[str, list[float]]]:
    import scaling.measure as module

    patched: Any = module
    patched.bytes_needed = lambda *_: 2**60
    layer, expected = sharded_layer(WEAK)
    results = verify_all(layer, expected, ["all_to_all", CONVENTIONAL])
    measure_all(layer, results, 2, lambda: None)
    report = ProblemReport(WEAK, [Point(2, "all_to_all", [], results)])
    left_out = results[CONVENTIONAL]
    return left_out.failure, table(report), left_out.seconds


def test_a_baseline_that_does_not_fit_is_left_out(rank_pools: RankPools) -> None:
    for failure, printed, seconds in rank_pools.run(2, baseline_without_memory):
        assert failure.startswith("left out: rows of all pairs take")
        assert failure in printed
        assert seconds == {}


NETWORK = Network(
    {
        "all_to_all": Link(1.0, 10.0),
        "all_gather": Link(2.0, 20.0),
        "reduce_scatter": Link(3.0, 30.0),
    },
    ranks_per_host=2,
    between_hosts=5.0,
    memory=math.inf,
)


@pytest.mark.parametrize(
    ("collective", "ranks", "expected"),
    [
        ("all_to_all", 1, 0.0),
        # Half of 80 bytes leaves, at 10 bytes/s.
        ("all_to_all", 2, 1 + 40 / 10),
        # A quarter to the other of the host, half to the other host at 5 bytes/s.
        ("all_to_all", 4, 1 + 40 / 5),
        ("all_gather", 2, 2 + 80 / 20),
        # Two ranks of the other host, 80 bytes each, shared out among the two here.
        ("all_gather", 4, 2 + 80 / 5),
        ("reduce_scatter", 2, 3 + 40 / 30),
        ("reduce_scatter", 4, 3 + 20 / 5),
    ],
)
def test_seconds_of_a_collective(collective: str, ranks: int, expected: float) -> None:
    assert NETWORK.seconds(collective, 80, ranks) == pytest.approx(expected)


def test_a_prediction_by_hand() -> None:
    """H=16 and float32: rows and sums of 64 bytes; 4 experts a token, of ranks that get 30 and 50
    of 80 pairs."""
    loads = [Load(9, 7, 40, 30, 10), Load(8, 10, 40, 50, 10)]
    found = predict("all_to_all", WEAK, loads, NETWORK, one_rank_seconds=8.0)
    # Half leaves: counts of 80 bytes, row pairs 4 a row, pairs 8 each, rows; sums of rows received;
    # backward rows, sums, weights of 4 a pair received.
    handed = 80 + 4 * 8 + 8 * 40 + 64 * 8 + 64 * 10 + 64 * 8 + 64 * 10 + 4 * 50
    messages = 1 + 1 + 2 + 1 + 1 + 1 + 1 + 1
    assert found.communication == pytest.approx(messages + handed / 2 / 10)
    # A share of 50 pairs where the mean has 40.
    assert found.experts == pytest.approx(8.0 * 50 / 40)


def test_predictions_of_even_routing_share_the_work() -> None:
    strong = Problem("strong", 64, 16, 30, 4, "float32", "uniform", 0.0)
    assert predict_even("all_to_all", WEAK, 8, NETWORK, 8.0).experts == pytest.approx(8.0)
    assert predict_even("all_gather", strong, 8, NETWORK, 8.0).experts == pytest.approx(1.0)
    gathered = predict_even("all_gather", WEAK, 64, NETWORK, 8.0)
    assert gathered.communication > predict_even("all_to_all", WEAK, 64, NETWORK, 8.0).communication
