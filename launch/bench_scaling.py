"""Measure how the expert-parallel layer scales: time, memory and phases on 1, 2, 4, ... ranks.

    torchrun --standalone --nproc-per-node 2 launch/bench_scaling.py --json FILE --plot FILE
    torchrun --standalone --nproc-per-node 2 launch/bench_scaling.py --scaling weak \\
        --num-experts-per-tok 512 --routing zipf --dispatcher auto all_gather

Variants are both dispatchers and the conventional dispatch, which sends a row for every (token,
expert) pair. They run on the same inputs, and each must agree with one device before it is timed.
Each time is printed with the prediction of the volume model, which uses link rates measured in the
same run; for more ranks than there are, only predictions are printed. Without GPUs, smaller
problems run over gloo.

To compare two builds, run it on the same machine from a checkout of each, with the checkout first
on PYTHONPATH, and compare seconds.loop of the results in the JSON files:

    for build in base new; do PYTHONPATH=$build torchrun --standalone --nproc-per-node 2 \\
        $build/launch/bench_scaling.py --scaling weak --num-experts-per-tok 64 --json $build.json
    done
"""

from signals import end_with_torchrun

# Before the other imports, which take seconds.
end_with_torchrun()

import argparse
import gc
import io
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from errors import exit_on_error, exit_on_shared_error
from flash_moe.bench.cases import make_inputs
from flash_moe.bench.device_rates import copy_rate
from flash_moe.bench.report import device_name, versions
from flash_moe_dist.agreement import same_error_on_all_ranks
from flash_moe_dist.runtime import DEFAULT_TIMEOUT, Runtime, distributed, own_device
from scaling.arguments import DISPATCHERS, SCRIPT, parse, problems_of, variants
from scaling.layer import Layer
from scaling.links import measure_links
from scaling.measure import measure_all, rounds
from scaling.predict import Link, Network, predict
from scaling.problems import Problem
from scaling.rank_group import RankGroup
from scaling.report import Point, ProblemReport, assumptions, table, write_json, write_plot
from scaling.traffic import Traffic
from scaling.verify import results_of_one_device, verify_all

# Numbers of ranks that are predicted if there are fewer.
EXTRAPOLATED_RANKS = (8, 64, 512)


def measure_point(
    problem: Problem, ranks: RankGroup, args: argparse.Namespace, advance: Callable[[], object]
) -> Point:
    """Verify and measure all variants of a problem on `ranks`. Collective over them.

    advance: moves a progress bar.
    """
    inputs = make_inputs(problem.case(ranks.size), ranks.device)
    layer = Layer(inputs, ranks)
    chosen, traffic = variants(args.dispatcher, problem, ranks.size), layer.traffic()
    results = verify_all(layer, results_of_one_device(inputs, layer), chosen, traffic)
    # The whole tables would count as memory of the layer.
    del inputs
    measure_all(layer, results, args.repeats, advance)
    extrapolated = {} if ranks.size > 1 else extrapolate_traffic(problem, layer)
    return Point(ranks.size, results, traffic, extrapolated)


def extrapolate_traffic(problem: Problem, layer: Layer) -> dict[int, Traffic]:
    """Traffic of EXTRAPOLATED_RANKS ranks, if all route their tokens as `layer`, on one rank."""
    indices_TK = layer.tokens.indices_TK
    return {
        ranks: Traffic.extrapolated(
            indices_TK,
            problem.num_experts,
            ranks,
            problem.tokens if problem.scaling == "weak" else problem.tokens / ranks,
        )
        for ranks in EXTRAPOLATED_RANKS
    }


def predict_all(
    report: ProblemReport, measured_links: dict[int, Network], assumed_links: Network | None
) -> None:
    """Add predictions to `report`: of the points measured, and of more ranks than there are.

    Args:
        measured_links: rates of each number of ranks.
        assumed_links: rates between more ranks than there are; None if unknown.
    """
    one_rank = report.one_rank("total")
    for point in report.points[1:]:
        for name in DISPATCHERS:
            point.predictions[name] = predict(
                name, report.problem, point.traffic, measured_links[point.ranks], one_rank
            )
    if assumed_links is None:
        return
    for ranks, traffic in report.points[0].extrapolated_traffic.items():
        # Strong scaling can leave less than a token for each rank.
        if ranks > report.points[-1].ranks and traffic.max_tokens >= 1:
            report.extrapolated[ranks] = {
                name: predict(name, report.problem, traffic, assumed_links, one_rank)
                for name in DISPATCHERS
            }


def assume_links(args: argparse.Namespace, measured_links: dict[int, Network]) -> Network | None:
    """Links between more ranks than there are: those measured within a host, and the options.

    None if no links within a host were measured.
    """
    within_host = [size for size in measured_links if size <= int(os.environ["LOCAL_WORLD_SIZE"])]
    if not within_host:
        return None
    network = measured_links[max(within_host)]
    links = {
        name: Link(
            link.latency if args.latency is None else args.latency * 1e-6,
            link.rate if args.link is None else args.link * 1e9,
        )
        for name, link in network.links.items()
    }
    return replace(network, links=links, ranks_per_host=args.ranks_per_host)


def run(args: argparse.Namespace, runtime: Runtime) -> None:
    """Measure links, then every problem on every number of ranks; the main rank writes reports."""
    device = runtime.device
    groups = {size: dist.new_group(range(size), timeout=runtime.timeout) for size in args.ranks}
    own_groups = {
        size: RankGroup(size, group, device)
        for size, group in groups.items()
        if runtime.rank < size
    }
    measured_links: dict[int, Network] = {}
    for size in args.ranks[1:]:
        dist.barrier()
        if size in own_groups:
            # Measured over all links between these ranks, so the model treats them as one host.
            links = measure_links(own_groups[size])
            measured_links[size] = Network(links, size, args.network * 1e9, copy_rate(device))
    problems = problems_of(args)
    total = sum(
        len(variants(args.dispatcher, problem, size)) for problem in problems for size in args.ranks
    )
    title = f"{runtime.world_size} x {device_name(device)}, " + ", ".join(
        f"{name} {version}" for name, version in versions().items()
    )
    assumed_links = assume_links(args, measured_links) if runtime.is_main else None
    reports: list[ProblemReport] = []
    with tqdm(
        total=total * rounds(args.repeats),
        desc="scaling",
        unit="round",
        disable=not runtime.is_main,
    ) as progress:
        if runtime.is_main:
            progress.write("\n".join([title, *assumptions(measured_links, assumed_links)]))
        for problem in problems:
            report = ProblemReport(problem, args.repeats, device.type == "cuda")
            for size in args.ranks:
                # Ranks that are not measured wait here, so that they do not disturb the others.
                dist.barrier()
                if size in own_groups:
                    point = measure_point(problem, own_groups[size], args, progress.update)
                    report.points.append(point)
            if not runtime.is_main:
                continue
            predict_all(report, measured_links, assumed_links)
            reports.append(report)
            # After every problem, so that an interrupted run still has results.
            progress.write(table(report))
            if args.json:
                write_json(args.json, args, runtime, measured_links, assumed_links, reports)
            if args.plot:
                write_plot(args.plot, title, reports)


@record
def main() -> None:
    """Parse the options on every rank, join the process group, and run."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    timeout, option_error = DEFAULT_TIMEOUT, None
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        # Only one rank prints --help.
        with nullcontext() if is_main else redirect_stdout(io.StringIO()):
            args = parse(__doc__ or "", sys.argv[1:], torch.cuda.is_available(), world_size)
        problems_of(args)
        timeout = timedelta(seconds=args.timeout)
    except ValueError as error:
        option_error = error
    with exit_on_error(SCRIPT, RuntimeError):
        own_device()
    with distributed(timeout) as runtime:
        with exit_on_shared_error(SCRIPT, runtime, (ValueError,)):
            with same_error_on_all_ranks():
                if option_error is not None:
                    raise option_error
        run(args, runtime)


if __name__ == "__main__":
    # Garbage collections skip what was imported.
    gc.freeze()
    main()
