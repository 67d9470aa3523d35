"""Metrics of a run: what a validation writes, strict JSON, the panels of the plot."""

import io
import json
import math
from contextlib import closing, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from expected_load import Pass, usage_and_unevenness
from matplotlib.figure import Figure
from ranks import RankPools, rank_runtime
from small_run import small_run, write_text

NUM_EXPERTS, LAYERS = 50, ("layers.0.moe.experts", "layers.1.moe.experts")


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def trained(text: str, out: Path) -> tuple[dict[str, list[Pass]], list[bool], str]:
    """Train for two steps and sample; what the routers gave in evaluation mode, modes, output."""
    import train
    from flash_moe_dist import Checkpointer
    from metrics import MetricsFile
    from signals import StopSignals

    options = ("--steps", "2", "--validation-interval", "1", "--checkpoint-interval", "9")
    run = small_run(text, None, *options, "--out", str(out), "--sample-tokens", "2")
    modes: list[bool] = []
    chosen: dict[str, list[Pass]] = {name: [] for name in LAYERS}
    run.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for name, layer in zip(LAYERS, run.model.layers, strict=True):

        def record(module: Any, _: Any, of_pass: Pass, of_layer: Any = chosen[name]) -> None:
            if not module.training:
                of_layer.append(of_pass)

        layer.moe.router.register_forward_hook(record)
    checkpoints = Checkpointer(out / "checkpoints", run.args.keep)
    metrics = MetricsFile(out / "metrics.jsonl", 0) if rank_runtime().is_main else None
    with (
        redirect_stdout(io.StringIO()) as printed,
        closing(metrics) if metrics else nullcontext(),
        closing(checkpoints),
        StopSignals(run.args.grace) as signals,
    ):
        train.train(run, 1, checkpoints, metrics, signals)
    validated = {name: list(passes) for name, passes in chosen.items()}
    run.sample()
    assert run.model.training
    return validated, modes, printed.getvalue()


def test_a_validation_writes_usage_and_unevenness_of_each_layer(
    tmp_path: Path, rank_pools: RankPools
) -> None:
    text, out = write_text(tmp_path / "text"), tmp_path / "run"
    out.mkdir()
    results = rank_pools.run(2, trained, text, out)
    for _, modes, _ in results:
        training, batches = [True], (len(modes) - 4) // 2
        assert modes == (training + [False] * batches) * 2 + [False] * 2
        assert batches > 1
    texts = (out / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in texts]
    last = {}
    for name in LAYERS:
        passes = [one for validated, *_ in results for one in validated[name][-batches:]]
        last[name] = usage_and_unevenness(passes, NUM_EXPERTS)
        written = lines[-1]["expert_load"][name]
        assert (written["usage"], written["unevenness"]) == pytest.approx(last[name])
        assert lines[0]["expert_load"][name].keys() == written.keys()
    usages, unevennesses = zip(*last.values(), strict=True)
    printed = results[0][2].splitlines()[-1]
    assert f", mean usage {sum(usages) / 2:.1%}, " in printed
    assert f", largest unevenness {max(unevennesses):.2f} nats, " in printed


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    from metrics import MetricsFile

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0, "validation_loss": NaN}\n')
    metrics = MetricsFile(path, 1)
    layer = {"unevenness": math.nan, "pairs_per_rank": [1, 2], "usage": 0.5}
    metrics.write({"step": 2, "loss": math.inf, "expert_load": {"a": layer}})
    metrics.close()
    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0, "validation_loss": None},
        {"step": 2, "loss": None, "expert_load": {"a": layer | {"unevenness": None}}},
    ]


def xs_and_ys(line: Any) -> list[float]:
    return [*line.get_xdata(), *line.get_ydata()]


def plotted(path: Path, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Figure:
    from metrics import plot_metrics

    figures: list[Figure] = []
    savefig = Figure.savefig

    def recorded(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", recorded)
    plot_metrics(path / "loss.png", lines, 1.0)
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    return figures[-1]


def test_plot_has_panels_of_usage_and_unevenness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {
        "step": 3,
        "loss": 1.5,
        "validation_loss": 2.0,
        "expert_load": {
            "a": {"usage": 0.25, "unevenness": 1.0},
            "b": {"usage": 0.75, "unevenness": None},
        },
    }
    # Of an older version, of a step that was skipped, and of a validation loss of NaN.
    old = {"step": 1, "loss": 2.0, "validation_loss": 2.0, "expert_load": {"a": {"touched": 1.0}}}
    skipped = {"step": 2, "loss": None, "validation_loss": None}
    loss, *panels = plotted(tmp_path, [old, skipped, new], monkeypatch).axes
    assert xs_and_ys(loss.lines[1]) == [1, 3, 2.0, 2.0]
    assert [panel.get_title().partition(":")[0] for panel in panels] == [
        "Usage",
        "Unevenness of the experts' routing weights, at validation",
    ]
    assert [panel.get_ylabel() for panel in panels] == ["share of experts", "nats"]
    assert [xs_and_ys(panel.lines[0]) for panel in panels] == [[3, 0.5], [3, 1.0]]
    low, high = panels[0].collections[0].get_datalim(panels[0].transData).intervaly
    assert (low, high) == pytest.approx((0.25, 0.75))
    assert len(plotted(tmp_path, [old], monkeypatch).axes) == 1
    assert len(plotted(tmp_path, [], monkeypatch).axes) == 1
