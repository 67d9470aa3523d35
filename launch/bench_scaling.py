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
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from flash_moe.bench.cases import make_inputs
from flash_moe.bench.ceilings import copy_rate
from flash_moe.bench.report import device_name, versions
from flash_moe_dist.agreement import same_error_on_all_ranks
from flash_moe_dist.runtime import Runtime, distributed
from scaling.arguments import DISPATCHERS, parse, problems_of
from scaling.layer import Layer
from scaling.links import measure_links
from scaling.measure import CONVENTIONAL, measure_all, verify_all
from scaling.predict import Link, Network, predict, predict_even
from scaling.problems import Problem
from scaling.ranks import Ranks
from scaling.report import AUTO, Point, ProblemReport, table, write_json, write_plot
from scaling.verify import results_of_one_device

EXTRAPOLATED = (8, 64, 512)


def measure_point(
    problem: Problem, ranks: Ranks, args: argparse.Namespace, advance: Callable[[], object]
) -> Point:
    """Collective over `ranks`."""
    inputs = make_inputs(problem.case(ranks.size), ranks.device)
    layer = Layer(inputs, ranks)
    results = verify_all(layer, results_of_one_device(inputs, layer), variants(args, ranks.size))
    # Whole tables would count as memory of the layer.
    del inputs
    measure_all(layer, results, args.repeats, advance)
    return Point(ranks.size, layer.dispatcher_of(AUTO), ranks.gather(layer.load()), results)


def variants(args: argparse.Namespace, ranks: int) -> list[str]:
    """One rank has nothing to dispatch."""
    if ranks > 1:
        return args.dispatcher
    return [name for name in args.dispatcher if name != CONVENTIONAL][:1]


def predict_point(report: ProblemReport, point: Point, network: Network) -> None:
    for name in point.results:
        if point.ranks > 1 and name != CONVENTIONAL:
            dispatcher: Any = point.means if name == AUTO else name
            point.predictions[name] = predict(
                dispatcher, report.problem, point.loads, network, report.one_rank("total")
            )


def extrapolate(report: ProblemReport, network: Network) -> None:
    for ranks in EXTRAPOLATED:
        if network.links and ranks > report.points[-1].ranks:
            report.extrapolated[ranks] = {
                name: predict_even(name, report.problem, ranks, network, report.one_rank("total"))
                for name in DISPATCHERS
            }


def networks(
    args: argparse.Namespace, ranks: list[Ranks], memory: float
) -> tuple[dict[int, Network], Network]:
    """Of the ranks there are, by their number, and of more; collective over `ranks`."""
    between_hosts = args.network * 1e9
    # All ranks are as near to each other as when their links were measured.
    found = {
        some.size: Network(measure_links(some), some.size, between_hosts, memory) for some in ranks
    }
    beyond = found[max(found)]
    if args.link is not None:
        links = {name: Link(link.latency, args.link * 1e9) for name, link in beyond.links.items()}
        beyond = replace(beyond, links=links)
    return found, replace(beyond, ranks_per_host=args.ranks_per_host)


def run(args: argparse.Namespace, runtime: Runtime) -> None:
    device = runtime.device
    groups = {size: dist.new_group(range(size), timeout=runtime.timeout) for size in args.ranks}
    mine = [Ranks(n, group, device) for n, group in groups.items() if runtime.rank < n]
    near, beyond = networks(args, mine, copy_rate(device))
    about = {
        "command": sys.argv[1:],
        "versions": versions(),
        "device": {"type": device.type, "name": device_name(device)},
        "world_size": runtime.world_size,
        "networks": [asdict(network) for network in (*near.values(), beyond)],
    }
    title = f"{runtime.world_size} x {device_name(device)}, " + ", ".join(
        f"{name} {version}" for name, version in versions().items()
    )
    problems = problems_of(args)
    total = len(problems) * sum(len(variants(args, size)) for size in args.ranks)
    reports: list[ProblemReport] = []
    with tqdm(total=total, desc="scaling", unit="variant", disable=not runtime.is_main) as progress:
        progress.write(title) if runtime.is_main else None
        for problem in problems:
            report = ProblemReport(problem)
            for ranks in mine:
                point = measure_point(problem, ranks, args, progress.update)
                report.points.append(point)
                if runtime.is_main:
                    predict_point(report, point, near[ranks.size])
            if not runtime.is_main:
                continue
            extrapolate(report, beyond)
            reports.append(report)
            # At once, so that a run that is cut off still shows what it measured.
            progress.write(table(report))
            if args.json:
                write_json(args.json, about, reports)
            if args.plot:
                write_plot(args.plot, title, reports)


@record
def main() -> None:
    with distributed() as runtime:
        try:
            with same_error_on_all_ranks():
                args = parse(__doc__ or "", sys.argv[1:], runtime.device, runtime.world_size)
                problems_of(args)
        except ValueError as error:
            if runtime.is_main:
                print(f"bench_scaling.py: error: {error}", file=sys.stderr, flush=True)
            dist.barrier()
            sys.exit(2)
        run(args, runtime)


if __name__ == "__main__":
    main()
