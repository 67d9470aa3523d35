"""launch/compare.py: variants trained on the same tokens, resumed, and compared at equal time."""

import json
import sys
import weakref
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

import flash_moe_dist

NAMES = ("compare.json", "compare.md", "compare.png")
SMALL = (
    *("--steps", "7", "--validation-interval", "3", "--validation-batches", "2"),
    *("--batch-size", "2", "--seq-len", "16", "--hidden-size", "16", "--intermediate-size", "16"),
    *("--num-layers", "2", "--num-heads", "2", "--num-experts", "16", "36"),
    *("--num-experts-per-tok", "3", "--bpe-vocab", "300", "--variants", "dense", "default"),
)


def compare(*options: str) -> None:
    import compare as script

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            # Instead of Triton's interpreter.
            patch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
        patch.setattr(sys, "argv", ["launch/compare.py", *options])
        script.main()


def results_in(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads((folder / "compare.json").read_text(), parse_constant=refuse)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Run what is refused; return the last line printed."""
    with pytest.raises(SystemExit) as ended:
        compare(*options)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def options(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a comparison that was cut off once, and then finished."""
    out = str(tmp_path_factory.mktemp("compare") / "out")
    options = (*SMALL, "--data", text, "--out", out)
    compare(*options, "--time-limit", "1e-9")
    cut_off = results_in(Path(out))["rows"]
    assert [(row["variant"], row["finished"]) for row in cut_off] == [("dense", False)]
    assert "not finished: dense, no experts, seed 0: ended after step 0" in (
        Path(out, "compare.md").read_text()
    )
    compare(*options)
    return options


def test_rows_and_table(options: tuple[str, ...]) -> None:
    out = Path(options[-1])
    results = results_in(out)
    rows = {(row["variant"], row["num_experts"]): row for row in results["rows"]}
    assert rows.keys() == {("dense", 0), ("default", 16), ("default", 36)}
    assert results["data"]["vocab_size"] == 300
    for (_, num_experts), row in rows.items():
        assert row["finished"]
        assert row["failure"] is None
        assert [point["step"] for point in row["curve"]] == [0, 3, 6, 7]
        assert [point["tokens"] for point in row["curve"]] == [0, 96, 192, 224]
        seconds = [point["seconds"] for point in row["curve"]]
        assert seconds == sorted(seconds)
        assert (seconds[0], row["final"]["seconds"]) == (0, seconds[-1])
        last = row["curve"][-1]
        assert last["validation_loss"] < row["curve"][0]["validation_loss"]
        assert len(last["usage"]) == len(last["unevenness"]) == (2 if num_experts else 0)
        # Of one seed, all rows see the same tokens.
        assert last["batches"] == rows["dense", 0]["curve"][-1]["batches"]
        assert row["settings"]["lr"] == pytest.approx(2e-3 * 8**0.5)
    assert rows["dense", 0]["settings"]["intermediate_size"] == 16 + 2
    # In two layers, two rows of 16 for each of 20 more experts, and 12 keys instead of 8.
    more = rows["default", 36]["parameters"] - rows["default", 16]["parameters"]
    assert more == 2 * 16 * (2 * 20 + 12 - 8)
    table = (out / "compare.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table] == [
        "variant",
        "-" * (len(table[1].split("|")[1])),
        "dense",
        "default",
        "default",
    ]
    assert f"{rows['dense', 0]['final']['validation_loss']:.4f}" in table[2]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_finished_rows_are_kept(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(options[-1])
    before = results_in(out)
    compare(*options)
    assert "; 300 token ids" not in capsys.readouterr().out
    assert results_in(out) == before


def test_a_further_variant(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(options[-1])
    before = results_in(out)["rows"]
    models = []

    def materialize(model: Any, device: torch.device) -> None:
        models.append(weakref.ref(model))
        flash_moe_dist.materialize(model, device)

    monkeypatch.setattr("comparison.training.materialize", materialize)
    compare(*options, "--variants", "--variant", "fast:num_experts=16,lr=0.5,table_lr_scale=2")
    # The next one has its memory.
    assert [model() for model in models] == [None]
    rows = results_in(out)["rows"]
    assert rows[: len(before)] == before
    (added,) = rows[len(before) :]
    assert (added["variant"], added["num_experts"]) == ("fast", 16)
    settings = added["settings"]
    assert (settings["lr"], settings["table_lr_scale"], settings["score_norm"]) == (0.5, 2, "batch")


def test_tokens_decode_to_the_text(options: tuple[str, ...], text: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from bpe import encoded_corpus
    from data import load_corpus

    folder = Path(options[-1]) / "bpe-300"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [np.fromfile(folder / f"{name}.bin", dtype="<u2") for name in ("train", "val")]
    assert max(map(max, ids)) < 300
    decoded = "".join(tokenizer.decode(part.tolist()) for part in ids)
    assert decoded == Path(text).read_text()
    # Another text is encoded again; characters outside of the training text are bytes of UTF-8.
    other = tmp_path / "other.txt"
    other.write_text(
        "x  \u00e4\n\n\t\u20ac \U0001f600 " * 500 + "ab" * 999 + "\n", encoding="utf-8"
    )
    corpus = load_corpus(other, 16)
    for _ in range(2):
        encoded = encoded_corpus(corpus, 260, tmp_path, 16)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert len(encoded.train) < len(corpus.train)
        assert tokenizer.decode(encoded.train.tolist()).encode() == corpus.train.tobytes()


def test_pieces_of_text_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import bpe

    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 8)
    content = "short\na longer line than a piece\n\n\u00e4\u20ac\n".encode()
    pieces = list(bpe._pieces(np.frombuffer(content, dtype=np.uint8)))
    assert "".join(pieces).encode() == content
    assert pieces[:3] == ["short\n", "a longer", " line th"]


def row_of(variant: str, curve: list[tuple[int, float, float]], batches: str = "same") -> Any:
    """A finished row; `curve` holds steps, seconds and validation losses."""
    from comparison.results import Point, Row

    points = [
        Point(step, 10 * step, seconds, None, loss, [0.5], [1.0], batches)
        for step, seconds, loss in curve
    ]
    return Row(variant, 4, 0, {}, {}, curve=points, finished=True)


def test_equal_tokens_and_equal_time() -> None:
    from comparison.report import table
    from comparison.results import common

    fast = row_of("fast", [(0, 0.0, 6.0), (10, 1.0, 4.0), (20, 2.0, 3.0)])
    slow = row_of("slow", [(0, 0.0, 6.0), (10, 4.0, 3.0), (20, 8.0, 1.0)])
    assert common([fast, slow]) == (20, 2.0)
    assert (fast.loss_at_seconds(2.0), slow.loss_at_seconds(2.0)) == (3.0, 4.5)
    lines = [[cell.strip() for cell in line.split("|")] for line in table([fast, slow]).split("\n")]
    assert lines[0][4:6] == ["loss at 200 tokens", "loss at 2.0 s"]
    assert [line[4:6] for line in lines[2:]] == [["3.0000", "3.0000"], ["1.0000", "4.5000"]]


def test_rows_of_other_tokens_are_found() -> None:
    from comparison.results import check_same_batches

    one, other = (row_of(name, [(10, 1.0, 4.0)], name) for name in ("one", "other"))
    with pytest.raises(RuntimeError, match="other and one were trained on different tokens up to"):
        check_same_batches([one, other])


def test_compilation_does_not_count() -> None:
    from comparison.training import _Training

    training: Any = _Training.__new__(_Training)
    training.seconds = [50.0, 1.0, 1.0, 1.0, 20.0, 1.0, 3.0, 2.0]
    training.device = type("Device", (), {"type": "cpu"})
    training.args = type("Args", (), {"batch_size": 2, "seq_len": 8})
    row = row_of("one", [(0, 0.0, 6.0), (3, 0.0, 5.0), (8, 0.0, 4.0)])
    training.add_times(row)
    assert [point.seconds for point in row.curve] == [0.0, 6.0, 16.0]
    assert row.tokens_per_s == 8


REFUSED = {
    "another number of steps": (["--steps", "8"], "holds results with steps = 7, here 8"),
    "other settings of a variant": (
        ["--lr", "0.1"],
        "holds results of dense, seed 0 with lr = 0.00565",
    ),
    "vocabulary too large for uint16": (
        ["--bpe-vocab", "65536"],
        "--bpe-vocab must be from 256 to 65,535 (ids are uint16), got 65,536",
    ),
    "vocabulary too large for the text": (
        ["--bpe-vocab", "60000"],
        "--bpe-vocab must be at most ",
    ),
    "setting that there is none of": (
        ["--variant", "x:heads=2"],
        "--variant must set some of hidden_size, ",
    ),
    "setting of a wrong value": (
        ["--variant", "x:score_norm=layer"],
        "--variant x must have a valid score_norm, got 'layer'",
    ),
    "model that cannot be built": (
        ["--variant", "x:num_heads=3"],
        "variant x: hidden_size must be",
    ),
    "name of a built-in variant": (["--variant", "dense:lr=1"], "--variant must have another name"),
    "one name twice": (
        ["--variant", "x:lr=1", "--variant", "x:lr=2"],
        "--variant must have a name of its own, got x twice",
    ),
    "no experts": (["--num-experts", "16", "0"], "--num-experts must be positive, got 0"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    given: list[str], message: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = results_in(Path(options[-1]))
    assert message in refusal(capsys, *options, *given)
    assert results_in(Path(options[-1])) == before


def test_damaged_results_are_refused(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("{", "{}", '{"options": {}, "data": {}, "rows": [{"curve": []}]}'):
        (tmp_path / "compare.json").write_text(content)
        last = refusal(capsys, *options, "--out", str(tmp_path))
        assert "--out must be free of damaged files, got " in last


def test_a_model_that_diverges_is_reported(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ("--out", str(tmp_path), "--variants", "--variant", "wild:num_experts=16,lr=1e9")
    compare(*options, *wild)
    (row,) = results_in(tmp_path)["rows"]
    assert not row["finished"]
    assert row["failure"]
    assert "not finished: wild, 16 experts, seed 0: " in capsys.readouterr().out
