"""How the expert-parallel layer scales: time, memory and steps on 1, 2, 4, ... of the ranks.

    torchrun --standalone --nproc-per-node 2 launch/bench_scaling.py --json FILE --plot FILE
    torchrun --standalone --nproc-per-node 2 launch/bench_scaling.py --scaling weak \\
        --num-experts-per-tok 512 --routing zipf --dispatcher auto all_gather

Every variant runs on the same inputs and must agree with one device before it gets a time: both
dispatchers, what "auto" makes of them, and the conventional dispatch in which each (token, expert)
pair carries its row. Beside each time stands the one that the volume model predicts from rates of
the links, which are measured in the same run; more ranks than there are, are predicted only.
Without GPUs a small version runs over gloo.
"""

import argparse
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

from errors import an_error_of_all_ranks_ends_the_run
from flash_moe.bench.cases import make_inputs
from flash_moe.bench.ceilings import copy_rate
from flash_moe.bench.report import device_name, versions
from flash_moe_dist.agreement import same_error_on_all_ranks
from flash_moe_dist.runtime import DEFAULT_TIMEOUT, Runtime, distributed
from scaling.arguments import DISPATCHERS, parse, problems_of, variants
from scaling.layer import Layer
from scaling.links import measure_links
from scaling.measure import measure_all, rounds
from scaling.predict import Link, Network, predict
from scaling.problems import Problem
from scaling.ranks import Ranks
from scaling.report import Point, ProblemReport, assumptions, table, write_json, write_plot
from scaling.traffic import Traffic
from scaling.verify import results_of_one_device, verify_all

EXTRAPOLATED = (8, 64, 512)


def measure_point(
    problem: Problem, ranks: Ranks, args: argparse.Namespace, advance: Callable[[], object]
) -> Point:
    """Collective over `ranks`."""
    inputs = make_inputs(problem.case(ranks.size), ranks.device)
    layer = Layer(inputs, ranks)
    chosen, traffic = variants(args.dispatcher, problem, ranks.size), layer.traffic()
    results = verify_all(layer, results_of_one_device(inputs, layer), chosen, traffic)
    # Whole tables would count as memory of the layer.
    del inputs
    measure_all(layer, results, args.repeats, advance)
    further = {} if ranks.size > 1 else further_traffic(problem, layer)
    return Point(ranks.size, results, traffic, further)


def further_traffic(problem: Problem, layer: Layer) -> dict[int, Traffic]:
    """Of more ranks than there are, if all their tokens are routed as those of one rank."""
    indices_TK = layer.tokens.indices_TK
    return {
        ranks: Traffic.drawn_alike(
            indices_TK,
            problem.num_experts,
            ranks,
            problem.tokens if problem.scaling == "weak" else problem.tokens / ranks,
        )
        for ranks in EXTRAPOLATED
    }


def predict_all(report: ProblemReport, near: dict[int, Network], beyond: Network | None) -> None:
    """Of all points but that of one rank; of more ranks than there are if their links are known."""
    one_rank = report.one_rank("total")
    for point in report.points[1:]:
        for name in DISPATCHERS:
            point.predictions[name] = predict(
                name, report.problem, point.traffic, near[point.ranks], one_rank
            )
    for ranks, traffic in report.points[0].further.items():
        # A rank cannot have a part of a token.
        if beyond is not None and ranks > report.points[-1].ranks and traffic.most_tokens >= 1:
            report.extrapolated[ranks] = {
                name: predict(name, report.problem, traffic, beyond, one_rank)
                for name in DISPATCHERS
            }


def network_beyond(args: argparse.Namespace, near: dict[int, Network]) -> Network | None:
    """Of more ranks than there are: the links of one host, and the network that was given."""
    in_a_host = [size for size in near if size <= int(os.environ["LOCAL_WORLD_SIZE"])]
    if not in_a_host:
        return None
    network = near[max(in_a_host)]
    links = {
        name: Link(
            link.latency if args.latency is None else args.latency * 1e-6,
            link.rate if args.link is None else args.link * 1e9,
        )
        for name, link in network.links.items()
    }
    return replace(network, links=links, ranks_per_host=args.ranks_per_host)


def run(args: argparse.Namespace, runtime: Runtime) -> None:
    device = runtime.device
    groups = {size: dist.new_group(range(size), timeout=runtime.timeout) for size in args.ranks}
    mine = {n: Ranks(n, group, device) for n, group in groups.items() if runtime.rank < n}
    near: dict[int, Network] = {}
    for size in args.ranks[1:]:
        dist.barrier()
        if size in mine:
            # All ranks are as near to each other as they are now.
            links = measure_links(mine[size])
            near[size] = Network(links, size, args.network * 1e9, copy_rate(device))
    problems = problems_of(args)
    total = sum(
        len(variants(args.dispatcher, problem, size)) for problem in problems for size in args.ranks
    )
    title = f"{runtime.world_size} x {device_name(device)}, " + ", ".join(
        f"{name} {version}" for name, version in versions().items()
    )
    beyond = network_beyond(args, near) if runtime.is_main else None
    reports: list[ProblemReport] = []
    with tqdm(
        total=total * rounds(args.repeats),
        desc="scaling",
        unit="round",
        disable=not runtime.is_main,
    ) as progress:
        if runtime.is_main:
            progress.write("\n".join([title, *assumptions(near, beyond)]))
        for problem in problems:
            report = ProblemReport(problem, args.repeats, device.type == "cuda")
            for size in args.ranks:
                # Ranks that are left out wait here, and do nothing that others would notice.
                dist.barrier()
                if size in mine:
                    point = measure_point(problem, mine[size], args, progress.update)
                    report.points.append(point)
            if not runtime.is_main:
                continue
            predict_all(report, near, beyond)
            reports.append(report)
            # At once, so that a run that is cut off still shows what it measured.
            progress.write(table(report))
            if args.json:
                write_json(args.json, args, runtime, near, beyond, reports)
            if args.plot:
                write_plot(args.plot, title, reports)


@record
def main() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    timeout, wrong = DEFAULT_TIMEOUT, None
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        # Only one rank prints --help.
        with nullcontext() if is_main else redirect_stdout(io.StringIO()):
            args = parse(__doc__ or "", sys.argv[1:], torch.cuda.is_available(), world_size)
        problems_of(args)
        timeout = timedelta(seconds=args.timeout)
    except ValueError as error:
        wrong = error
    with distributed(timeout) as runtime:
        with an_error_of_all_ranks_ends_the_run("bench_scaling.py", runtime, (ValueError,)):
            with same_error_on_all_ranks():
                if wrong is not None:
                    raise wrong
        run(args, runtime)


if __name__ == "__main__":
    main()
