"""Corpora: formats, split into training and validation, and invalid data."""

import bz2
import gzip
import io
import json
import os
import pickle
import sys
import tarfile
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
    content = "a\u00e4\u6587\x1b[1m\n".encode() * 200
    (tmp_path / "text").write_bytes(content)
    corpus = load_corpus(tmp_path / "text", 16)
    assert (len(corpus.train), len(corpus.validation)) == (2090, 110)
    assert corpus.train[:3].tolist() == [97, 0xC3, 0xA4]
    # The last character is cut, as by head -c.
    (tmp_path / "text").write_bytes(content + b"\xc3")
    assert len(load_corpus(tmp_path / "text", 16).validation) == 110


def test_folder_holds_out_whole_files(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([i + 100]) * 100)
    (tmp_path / "binary.so").write_bytes(b"\xff" * 100)
    corpus = load_corpus(tmp_path, 16)
    assert set(corpus.validation.tolist()) == {119, 139}
    assert set(corpus.train.tolist()) == set(range(100, 140)) - {119, 139}


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
    "no_val": "must hold val.bin beside train.bin, found none in",
    "pipe": "must name a file or a folder, got .*pipe, which is neither",
}


@pytest.mark.parametrize(("name", "message"), BAD_DATA.items())
def test_bad_data(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"123456789")
    (tmp_path / "one_byte.txt").write_bytes(b"1")
    (tmp_path / "one_byte.bin").write_bytes(b"1")
    (tmp_path / "empty.bin").touch()
    (tmp_path / "odd.bin").write_bytes(b"1" * 33)
    # Of files that have a name with a dot in front there is no text.
    (tmp_path / "no_text" / ".venv").mkdir(parents=True)
    (tmp_path / "no_text" / ".venv" / "a.txt").write_text(TEXT)
    (tmp_path / "no_val").mkdir()
    (tmp_path / "no_val" / "train.bin").write_bytes(b"12" * 500)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / name, 16)


IDS = np.random.default_rng(0).integers(0, 50_257, 5000)
TEXT = "Ein Satz, der sich wiederholt: \u00e4\u00f6\u00fc. " * 200
WEIGHTS = np.random.default_rng(0).normal(0, 0.02, 5000)
JSON_LINES = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(100))
# The first is longer than what is looked at of other formats.
LONG_LINES = "".join(json.dumps({"text": "a" * 2**size}) + "\n" for size in (22, 3))


def ids(dtype: str, values: Any = IDS) -> bytes:
    return bytes(values.astype(dtype).tobytes())


def tar_of(content: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("corpus.txt")
        info.size = len(content.encode())
        archive.addfile(info, io.BytesIO(content.encode()))
    return file.getvalue()


def shard(date: int, dtype: str) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = date, 1, len(IDS)
    return header.tobytes() + ids(dtype)


def in_memory(write: Callable[..., Any], *arrays: Any) -> bytes:
    file = io.BytesIO()
    write(file, *arrays)
    return file.getvalue()


PICKLED = {"a list": IDS.tolist(), "a dict": {"ids": IDS}, "an array": IDS, "a string": TEXT}

# File, its content, what the message says it holds.
FOREIGN = [
    ("ids.bin", ids("<u4"), "token ids of 32 bits"),
    ("small.bin", ids("<i4", IDS % 5), "token ids of 32 bits"),
    ("large.bin", ids("<u4", IDS * 3), "token ids of 32 bits"),
    ("padded.bin", ids("<i4", np.where(IDS % 9, IDS, -100)), "token ids of 32 bits"),
    ("ids.bin", ids("<i8"), "token ids of 64 bits"),
    ("large.bin", ids("<i8", IDS * 3), "token ids of 64 bits"),
    ("big.bin", ids(">u2"), "big-endian token ids of 16 bits"),
    ("bytes.bin", ids(">u2", IDS % 200), "big-endian token ids of 16 bits"),
    ("special.bin", ids(">u2", IDS % 260), "big-endian token ids of 16 bits"),
    ("big.bin", ids(">u4"), "big-endian token ids of 32 bits"),
    ("bytes.bin", ids(">i4", IDS % 200), "big-endian token ids of 32 bits"),
    ("big.bin", ids(">i8"), "big-endian token ids of 64 bits"),
    ("floats.bin", ids("<f4"), "floating-point numbers"),
    ("floats.bin", ids("<f4", IDS % 200), "floating-point numbers"),
    ("floats.bin", ids("<f8"), "floating-point numbers"),
    ("floats.bin", ids(">f4"), "floating-point numbers"),
    ("weights.bin", ids("<f4", WEIGHTS), "floating-point numbers"),
    ("padded.bin", ids("<f4", np.where(IDS % 2, IDS, 0)), "floating-point numbers"),
    ("weights.bin", ids("<f8", WEIGHTS), "floating-point numbers"),
    ("gpt2.bin", shard(20240520, "<u2"), "a shard of llm.c or modded-nanogpt, with a header"),
    ("llama3.bin", shard(20240801, "<u4"), "a shard of llm.c or modded-nanogpt, with a header"),
    ("text.bin", TEXT.encode(), "text"),
    ("array.bin", in_memory(np.save, IDS), "a NumPy array"),
    ("compressed.bin", gzip.compress(ids("<u2")), "gzip-compressed data"),
    ("bzip2.bin", bz2.compress(ids("<u2")), "bzip2-compressed data"),
    ("lz4.bin", b"\x04\x22\x4d\x18\x64\x40" + ids("<u2"), "lz4-compressed data"),
    ("archive.7z.bin", b"7z\xbc\xaf\x27\x1c\0\x04" + ids("<u2"), "a 7z archive"),
    ("database.bin", b"SQLite format 3\0\x10\0\x01\x01" + ids("<u2"), "an SQLite database"),
    ("elf.bin", Path(sys.executable).read_bytes(), "a program"),
    ("png.bin", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + ids("<u2"), "a PNG image"),
    ("jpeg.bin", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + ids("<u2"), "a JPEG image"),
    ("feather1.bin", b"FEA1\0\0\0\0" + ids("<u2"), "a Feather table"),
    ("feather2.bin", b"ARROW1\0\0" + ids("<u2"), "an Arrow or Feather table"),
    ("avro.bin", b"Obj\x01\x04\x16avro.schema" + ids("<u2"), "an Avro table"),
    *(
        (f"{kind}, pickle {protocol}.bin", pickle.dumps(value, protocol), "a pickle")
        for kind, value in PICKLED.items()
        for protocol in range(2, 6)
    ),
    (
        "old_torch.bin",
        in_memory(
            lambda file: torch.save(torch.ones(9), file, _use_new_zipfile_serialization=False)
        ),
        "a pickle",
    ),
    ("array.npy", in_memory(np.save, IDS), "a NumPy array"),
    ("arrays.npz", in_memory(np.savez, IDS), "a zip archive"),
    ("text.txt.gz", gzip.compress(TEXT.encode()), "gzip-compressed data"),
    ("tokens.dat", ids("<u4"), "binary data"),
    ("tokens", ids("<u2", IDS % 5000), "binary data"),
    ("utf16.txt", TEXT.encode("utf-16"), "UTF-16, not UTF-8"),
    ("utf16.txt", TEXT.encode("utf-16-le"), "binary data"),
    ("tokens", ids("<u2"), "binary data"),
    ("tokens", ids("<u2", IDS % 100), "binary data"),
    ("tokens", ids("<u1", IDS % 50), "binary data"),
    ("zeros", bytes(5000), "binary data"),
    ("latin1.txt", TEXT.encode("latin-1"), r"text that is not UTF-8 \(byte 0xe4 at offset 31\)"),
    (
        "late.txt",
        b"a" * (2**21 - 1) + "\u00e4".encode() + b"a\xe9a",
        r"text that is not UTF-8 \(byte 0xe9 at offset 2,097,154\)",
    ),
    ("cp932.txt", "\u6587\u5b57\u5316\u3051 ".encode("cp932") * 100, "text that is not UTF-8"),
    ("corpus.tar", tar_of(TEXT * 500), "a tar archive"),
    ("index.idx", b"MMIDIDX\0\0" + ids("<u4"), "an index of Megatron-LM"),
    ("lines.jsonl", JSON_LINES.encode(), "JSON"),
    ("lines.txt", JSON_LINES.encode(), "JSON lines"),
    ("long_lines.txt", LONG_LINES.encode(), "JSON lines"),
    ("one.json", json.dumps({"text": TEXT}).encode(), "JSON"),
    ("one.txt", json.dumps({"text": TEXT}, indent=1).encode("utf-8-sig"), "JSON"),
    ("objects.txt", json.dumps([{"text": TEXT}] * 2).encode() + b"\n", "JSON"),
    ("strings.txt", json.dumps([TEXT] * 2).encode(), "JSON"),
    ("ids.txt", json.dumps(IDS.tolist()).encode(), "JSON"),
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
    (tmp_path / "c.h").write_bytes(TEXT.encode("latin-1"))
    assert load_corpus(tmp_path, 16).is_text
    (tmp_path / "b.TXT").write_text("\0" * 99)
    with pytest.raises(ValueError, match=r"got binary data in .*b\.TXT$"):
        load_corpus(tmp_path, 16)


@pytest.mark.parametrize(
    ("name", "content", "is_read"),
    [
        ("package.json", '{"name": "it"}\n', True),
        ("array.txt", json.dumps([TEXT]), True),
        ("empty.py", "[]", True),
        ("lines.json", JSON_LINES, False),
        ("lines.txt", JSON_LINES, False),
        ("lines.jsonl", JSON_LINES, False),
        ("one_line.NDJSON", '{"a": 1}\n', False),
    ],
)
def test_json_in_a_folder_of_text(name: str, content: str, is_read: bool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / name).write_text(content)
    corpus = load_corpus(tmp_path, 16)
    stream = corpus.train.tobytes() + corpus.validation.tobytes()
    assert stream.decode() == TEXT + content * is_read


@pytest.mark.parametrize(
    "names", [("a.json",), ("a.jsonl",), ("a.json", "b.ndjson"), ("a.txt", "b.json")]
)
def test_a_folder_of_json_is_refused_as_its_files_are(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"text": TEXT}))
    with pytest.raises(ValueError, match=rf"uint16 token ids, got only JSON in {tmp_path}$"):
        load_corpus(tmp_path, 16)


def text_that_is_no_json() -> dict[str, str]:
    return {
        "a list in brackets": "[1] a first note\n[2] a second one\n" * 40,
        "quotations": '"Yes," she said.\n"No."\n' * 40,
        "braces": "{\n  a block of code;\n}\n" * 40,
        "link": "[[a page]] of a wiki, [another]\n" * 40,
        "deep": "[" * 100_000 + "]" * 100_000,
    }


@pytest.mark.parametrize("kind", text_that_is_no_json())
def test_text_that_begins_as_json_does(kind: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text_that_is_no_json()[kind])
    assert load_corpus(tmp_path / "text.txt", 16).is_text


def words(vocab_size: int, count: int = 5000) -> Any:
    """Ids as frequent as words: half of a file is the smaller part of the vocabulary."""
    draw = np.random.default_rng(vocab_size)
    return vocab_size ** draw.random(count) - 1


def alternating(one: Any, other: Any) -> Any:
    return np.stack(np.broadcast_arrays(one, other), axis=1).ravel()


VALID_IDS = {
    **{f"words of {size}": words(size) for size in (2, 4, 16, 200, 300, 8192, 50_257, 65_536)},
    **{f"few words of {size}": words(size, 400) for size in (200, 50_257, 65_536)},
    **{f"any of {size}": IDS * 7919 % size for size in (2, 16, 256, 300, 32_000, 65_536)},
    **{f"{count} any of 65536": IDS[:count] * 7919 % 65_536 for count in (400, 999, 1000)},
    "bytes of text": np.frombuffer(TEXT.encode(), np.uint8),
    "a and b": np.arange(5000) % 2,
    "one after the other": np.arange(60_000),
    "ids that look like upper halves of floats": IDS % 5000 + 14_000,
    "three ids": np.array([256, 770, 40_000])[IDS % 3],
    "one id": np.full(5000, 50_256),
    "end of text": np.full(5000, 256),
    "padded": np.concatenate([IDS, np.zeros(20_000)]),
    "digits and spaces": np.frombuffer(b"1 2 7 4 " * 800, np.uint8),
    "any digits and spaces": alternating(IDS % 10 + 48, 32),
    "digits and ends of lines": alternating(IDS % 10 + 48, 10),
    "a digit and ends of lines": np.frombuffer(b"1\n2\n" * 800, np.uint8),
    "ends of lines first": np.roll(alternating(IDS % 10 + 48, 10), 1),
    "b and a": np.arange(1, 5001) % 2,
    "words and a large id": alternating(IDS, 16_000),
    "words and a small id": alternating(IDS, 1),
    "a large id and words": alternating(50_000, IDS),
    "an id that is printable": np.full(5000, 24_929),
    "few ids, padded with the largest": np.where(IDS % 9, IDS * 7919 % 10, 65_535),
    "two vocabularies": alternating(IDS % 12_000, IDS * 7919 % 8000 + 12_000),
    "zeros and words": alternating(0, IDS),
    "even": IDS * 7919 % 32_000 * 2,
    "multiples of three": IDS * 7919 % 20_000 * 3,
    "odd": IDS * 7919 % 32_000 * 2 + 1,
    **{
        f"{bits} bits, left-justified": (IDS * 7919 % 2**bits) << (16 - bits)
        for bits in (4, 6, 7, 9, 10, 12, 14)
    },
}


@pytest.mark.parametrize("kind", VALID_IDS)
def test_uint16_ids_of_any_vocabulary(kind: str, tmp_path: Path) -> None:
    values = VALID_IDS[kind].astype("<u2")
    values.tofile(tmp_path / "ids.bin")
    corpus = load_corpus(tmp_path / "ids.bin", 16)
    held_out = len(values) // 20
    assert corpus.train.tolist() == values[:-held_out].tolist()
    assert corpus.validation.tolist() == values[-held_out:].tolist()


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
