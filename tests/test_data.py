"""Corpora: formats, split into training and validation, and invalid data."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import Corpus, batch_at, load_corpus


def write_tokens(path: Path, count: int) -> None:
    (np.arange(count) % 300).astype(np.uint16).tofile(path)


def test_default_is_the_standard_library() -> None:
    corpus = load_corpus(None, 256)
    assert corpus.is_text
    assert corpus.vocab_size == 256
    assert len(corpus.train) > 10 * len(corpus.validation) > 1_000_000
    assert b"def " in corpus.train[:100_000].tobytes()
    assert 2.5 < corpus.single_token_entropy() < 4


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(200)) * 10)
    corpus = load_corpus(tmp_path / "text", 16)
    assert (len(corpus.train), len(corpus.validation)) == (1900, 100)
    assert corpus.train[:3].tolist() == [0, 1, 2]


def test_folder_holds_out_whole_files(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([i]) * 100)
    (tmp_path / "binary.so").write_bytes(b"\xff" * 100)
    corpus = load_corpus(tmp_path, 16)
    assert set(corpus.validation.tolist()) == {19, 39}
    assert set(corpus.train.tolist()) == set(range(40)) - {19, 39}


def test_folder_whose_held_out_files_are_empty(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(b"a" * (100 if i < 19 else 0))
    corpus = load_corpus(tmp_path, 16)
    assert (len(corpus.train), len(corpus.validation)) == (1805, 95)


def test_bin_file_and_nanogpt_folder(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", 5000)
    write_tokens(tmp_path / "val.bin", 400)
    folder, file = load_corpus(tmp_path, 16), load_corpus(tmp_path / "train.bin", 16)
    assert not folder.is_text
    assert folder.vocab_size == file.vocab_size == 300
    assert (len(folder.train), len(folder.validation)) == (5000, 400)
    assert (len(file.train), len(file.validation)) == (4750, 250)


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    whole, targets = batch_at(tokens, 3, 0, 6, 10, slice(None))
    parts = [batch_at(tokens, 3, 0, 6, 10, slice(i, i + 2))[0] for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(targets, whole + 1)
    assert not torch.equal(whole, batch_at(tokens, 4, 0, 6, 10, slice(None))[0])


def test_every_token_can_be_drawn() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    batches = [batch_at(tokens, step, 0, 8, 10, slice(None)) for step in range(20)]
    assert torch.cat([inputs for inputs, _ in batches]).min() == 0
    assert torch.cat([targets for _, targets in batches]).max() == 11


BAD_DATA = {
    "missing": "found nothing at",
    "empty.txt": r"at least --seq-len \+ 1 = 17 tokens for training, got 0",
    "one_byte.txt": r"at least --seq-len \+ 1 = 17 tokens for training, got 1 ",
    "one_byte.bin": "must hold uint16 token ids, got 1 bytes",
    "empty.bin": "must hold uint16 token ids, got 0 bytes",
    "short.txt": r"at least --seq-len \+ 1 = 17 tokens for training, got 9",
    "odd.bin": "must hold uint16 token ids, got 33 bytes",
    "no_text": r"must hold text files .* found none in",
}


@pytest.mark.parametrize(("name", "message"), BAD_DATA.items())
def test_bad_data(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"123456789")
    (tmp_path / "one_byte.txt").write_bytes(b"1")
    (tmp_path / "one_byte.bin").write_bytes(b"1")
    (tmp_path / "empty.bin").touch()
    (tmp_path / "odd.bin").write_bytes(b"1" * 33)
    (tmp_path / "no_text").mkdir()
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / name, 16)


IDS = np.random.default_rng(0).integers(0, 50_257, 5000)
TEXT = "Ein Satz, der sich wiederholt: \u00e4\u00f6\u00fc. " * 200
JSON_LINES = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(100))


def ids(dtype: str, values: Any = IDS) -> bytes:
    return bytes(values.astype(dtype).tobytes())


def shard(date: int, dtype: str) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = date, 1, len(IDS)
    return header.tobytes() + ids(dtype)


def in_memory(write: Callable[..., Any], *arrays: Any) -> bytes:
    file = io.BytesIO()
    write(file, *arrays)
    return file.getvalue()


# File, its content, what the message says it holds.
FOREIGN = [
    ("ids.bin", ids("<u4"), "token ids of 32 bits"),
    ("small.bin", ids("<i4", IDS % 5), "token ids of 32 bits"),
    ("large.bin", ids("<u4", IDS * 3), "token ids of 32 bits"),
    ("padded.bin", ids("<i4", np.where(IDS % 9, IDS, -100)), "token ids of 32 bits"),
    ("ids.bin", ids("<i8"), "token ids of 64 bits"),
    ("large.bin", ids("<i8", IDS * 3), "token ids of 64 bits"),
    ("gpt2.bin", shard(20240520, "<u2"), "a shard of llm.c or modded-nanogpt, with a header"),
    ("llama3.bin", shard(20240801, "<u4"), "a shard of llm.c or modded-nanogpt, with a header"),
    ("text.bin", TEXT.encode(), "text"),
    ("array.bin", in_memory(np.save, IDS), "a NumPy array"),
    ("compressed.bin", gzip.compress(ids("<u2")), "gzip-compressed data"),
    ("array.npy", in_memory(np.save, IDS), "a NumPy array"),
    ("arrays.npz", in_memory(np.savez, IDS), "a zip archive"),
    ("text.txt.gz", gzip.compress(TEXT.encode()), "gzip-compressed data"),
    ("tokens.dat", ids("<u4"), "binary data"),
    ("tokens", ids("<u2", IDS % 5000), "binary data"),
    ("utf16.txt", TEXT.encode("utf-16"), "UTF-16, not UTF-8"),
    ("utf16.txt", TEXT.encode("utf-16-le"), "binary data"),
    ("index.idx", b"MMIDIDX\0\0" + ids("<u4"), "an index of Megatron-LM"),
    ("lines.jsonl", JSON_LINES.encode(), "JSON"),
    ("lines.txt", JSON_LINES.encode(), "JSON lines"),
    ("one.json", json.dumps({"text": TEXT}).encode(), "JSON"),
]


@pytest.mark.parametrize(("name", "content", "holds"), FOREIGN, ids=[one[0] for one in FOREIGN])
def test_formats_that_are_recognised_and_refused(
    name: str, content: bytes, holds: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    wanted = r"--data must (be text or|hold) uint16 token ids( \(\.bin\))?, got "
    with pytest.raises(ValueError, match=f"^{wanted}{holds}.* in .*{name}$"):
        load_corpus(tmp_path / name, 16)


def test_folders_with_formats_that_are_recognised(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", 400)
    (tmp_path / "val.bin").write_bytes(ids("<u4"))
    with pytest.raises(ValueError, match=r"got token ids of 32 bits in .*val\.bin"):
        load_corpus(tmp_path, 16)
    (tmp_path / "train.bin").unlink()
    (tmp_path / "a.txt").write_text(TEXT)
    # JSON is text in a folder of text, such as a source tree.
    (tmp_path / "package.json").write_text('{"name": "it"}\n')
    assert load_corpus(tmp_path, 16).is_text
    (tmp_path / "lines.json").write_text(JSON_LINES)
    with pytest.raises(ValueError, match=r"got JSON lines in .*lines\.json"):
        load_corpus(tmp_path, 16)


@pytest.mark.parametrize("vocab_size", [2, 4, 16, 300, 50_257, 65_536])
def test_uint16_ids_of_any_vocabulary(vocab_size: int, tmp_path: Path) -> None:
    """Ids as frequent as words: the first half of a file is the smaller part of the vocabulary."""
    draw = np.random.default_rng(vocab_size)
    values = (vocab_size ** draw.random(5000) - 1).astype("<u2")
    values.tofile(tmp_path / "ids.bin")
    corpus = load_corpus(tmp_path / "ids.bin", 16)
    assert corpus.train.tolist() == values[:4750].tolist()


def test_entropy_takes_little_memory() -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 2**24).astype(np.uint16)
    corpus = Corpus(tokens, tokens, 300, is_text=False, source="")
    tracemalloc.start()
    entropy = corpus.single_token_entropy()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entropy == pytest.approx(np.log(300), abs=1e-3)
    assert peak < tokens.nbytes


def test_data_that_cannot_be_read() -> None:
    """A file that even root can open, but whose first page cannot be read."""
    with pytest.raises(ValueError, match=r"--data must be readable, got \[Errno 5\]"):
        load_corpus(Path("/proc/self/mem"), 16)


def test_token_ids_outside_of_the_vocabulary(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", 200)
    write_tokens(tmp_path / "val.bin", 400)
    assert load_corpus(tmp_path, 16, 300).vocab_size == 300
    assert load_corpus(tmp_path, 16, 5000).vocab_size == 5000
    with pytest.raises(ValueError, match="below the model's vocabulary of 200, got 299 in valid"):
        load_corpus(tmp_path, 16, 200)
