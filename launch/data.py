"""Token streams to train on: the bytes of text, or a .bin file of uint16 token ids."""

import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_formats import (
    HEAD_BYTES,
    foreign_to_text,
    foreign_to_uint16,
    is_json,
    is_json_lines,
    not_utf8,
)

Tokens: TypeAlias = npt.NDArray[np.integer[Any]]

BYTE_VOCAB = 256
VALIDATION_SHARE = 0.05
# Larger than any --seed, so that all runs have the same validation batches.
VALIDATION_SEED = 2**31
COUNTED_AT_ONCE = 2**20
TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst", ".json", ".c", ".h", ".html", ".csv")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, two streams (N,).

    is_text: tokens are bytes. source: path of the data, for messages.
    """

    train: Tokens
    validation: Tokens
    vocab_size: int
    is_text: bool
    source: str

    def single_token_entropy(self) -> float:
        """Entropy of the validation tokens in nats: the loss of the best model without context."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        # bincount converts what it counts to int64.
        for start in range(0, len(self.validation), COUNTED_AT_ONCE):
            chunk = self.validation[start : start + COUNTED_AT_ONCE]
            counts += np.bincount(chunk, minlength=self.vocab_size)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def load_corpus(path: Path | None, seq_len: int, vocab_size: int | None = None) -> Corpus:
    """Read a corpus, and hold out a twentieth for validation.

    Of a folder of text, every twentieth file is held out; of anything else without a val.bin, the
    last twentieth of the tokens.

    Args:
        path: a UTF-8 text file; a folder, whose text files (.py, .txt, .md and the like, in any
            encoding of bytes, but no JSON lines, and nothing whose name begins with a dot) are read
            in the order of their paths; a .bin file of uint16 token ids; or a folder with train.bin
            and val.bin. None reads the source of Python's standard library.
        seq_len: tokens of a training sequence; each stream must have one more, the last target.
        vocab_size: upper bound of the token ids; by default one more than the largest, and 256 for
            text.

    Raises:
        ValueError: nothing readable at `path`, a file that `data_formats` recognises as something
            else, a folder of nothing but JSON, too few tokens for one sequence, or token ids
            outside the vocabulary.
    """
    if path is None:
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        corpus = _text_folder(stdlib, exclude=("site-packages", "dist-packages"), suffixes=(".py",))
    elif not path.exists():
        raise ValueError(f"--data must name a file or a folder, found nothing at {path}")
    elif not (path.is_dir() or path.is_file()):
        raise ValueError(f"--data must name a file or a folder, got {path}, which is neither")
    elif path.is_dir():
        corpus = _bin_folder(path) if (path / "train.bin").is_file() else _text_folder(path)
    elif path.suffix.lower() == ".bin":
        corpus = _token_corpus(*_split(_read_tokens(path)), source=str(path))
    else:
        corpus = _byte_corpus(*_split(_read_text(path)), source=str(path))
    for name, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"--data must give at least --seq-len + 1 = {seq_len + 1} tokens for {name}, "
                f"got {len(tokens)} from {corpus.source}"
            )
        if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
            raise ValueError(
                f"--data must hold token ids below the model's vocabulary of {vocab_size}, "
                f"got {largest} in {name} data from {corpus.source}"
            )
    return corpus if vocab_size is None else replace(corpus, vocab_size=vocab_size)


def batch_at(
    tokens: Tokens, step: int, seed: int, batch_size: int, seq_len: int, share: slice
) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets of one step, each (b, seq_len) int64.

    The batch depends on `seed` and `step` alone, so that any number of ranks trains on the same
    batches.

    Args:
        tokens: stream (N,).
        share: which of the `batch_size` sequences this rank gets, b of them.
    """
    draw = np.random.default_rng((seed, step))
    starts = draw.integers(0, len(tokens) - seq_len, size=batch_size)[share]
    rows = np.stack([tokens[start : start + seq_len + 1] for start in starts])
    sequences = torch.from_numpy(rows.astype(np.int64))
    return sequences[:, :-1], sequences[:, 1:]


def _bin_folder(folder: Path) -> Corpus:
    if not (folder / "val.bin").exists():
        raise ValueError(f"--data must hold val.bin beside train.bin, found none in {folder}")
    train, validation = _read_tokens(folder / "train.bin"), _read_tokens(folder / "val.bin")
    return _token_corpus(train, validation, source=str(folder))


def _text_folder(
    folder: Path,
    exclude: tuple[str, ...] = (),
    suffixes: tuple[str, ...] = TEXT_SUFFIXES,
) -> Corpus:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in (*suffixes, *JSON_LINES_SUFFIXES)
        and file.is_file()
        and not any(
            part in exclude or part.startswith(".") for part in file.relative_to(folder).parts
        )
    ]
    if not files:
        raise ValueError(
            f"--data must hold text files ({', '.join(suffixes)}) or train.bin and val.bin, "
            f"found none in {folder}"
        )
    # JSON is text in a folder of text, such as a source tree; JSON lines are left out.
    contents = {
        file: content
        for file in files
        if file.suffix.lower() not in JSON_LINES_SUFFIXES
        and not is_json_lines(content := _read_bytes(file))
    }
    if all(file.suffix.lower() == ".json" or is_json(one) for file, one in contents.items()):
        raise ValueError(f"--data must be text or uint16 token ids, got only JSON in {folder}")
    every = round(1 / VALIDATION_SHARE)
    texts = [np.frombuffer(content, dtype=np.uint8) for content in contents.values()]
    whole = np.concatenate(texts)
    held_out = texts[every - 1 :: every]
    # With few files, or empty ones among those held out, hold out the end of the stream instead.
    if sum(map(len, held_out)) < len(whole) * VALIDATION_SHARE / 4:
        return _byte_corpus(*_split(whole), source=str(folder))
    training = [text for i, text in enumerate(texts) if i % every != every - 1]
    return _byte_corpus(np.concatenate(training), np.concatenate(held_out), source=str(folder))


def _split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    cut = len(tokens) - int(len(tokens) * VALIDATION_SHARE)
    return tokens[:cut], tokens[cut:]


def _byte_corpus(train: Tokens, validation: Tokens, source: str) -> Corpus:
    return Corpus(train, validation, BYTE_VOCAB, is_text=True, source=source)


def _token_corpus(train: Tokens, validation: Tokens, source: str) -> Corpus:
    largest = max((int(stream.max()) for stream in (train, validation) if len(stream)), default=0)
    return Corpus(train, validation, largest + 1, is_text=False, source=source)


def _read_text(path: Path) -> Tokens:
    """Read a file that must be UTF-8 text and no JSON."""
    content = _read_bytes(path)
    found = not_utf8(content)
    if is_json_lines(content):
        found = "JSON lines"
    elif path.suffix.lower() in (".json", *JSON_LINES_SUFFIXES) or is_json(content):
        found = "JSON"
    if found:
        raise ValueError(f"--data must be text or uint16 token ids (.bin), got {found} in {path}")
    return np.frombuffer(content, dtype=np.uint8)


def _read_bytes(path: Path) -> bytes:
    """Read a file of text in any encoding of bytes; JSON is text here."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--data must be readable, got {error}") from error
    if found := foreign_to_text(content):
        raise ValueError(f"--data must be text or uint16 token ids (.bin), got {found} in {path}")
    return content


def _read_tokens(path: Path) -> Tokens:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if found := foreign_to_uint16(head):
            raise ValueError(f"--data must hold uint16 token ids, got {found} in {path}")
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(f"--data must hold uint16 token ids, got {size} bytes in {path}")
        return np.memmap(path, dtype=np.uint16, mode="r")
    except OSError as error:
        raise ValueError(f"--data must be readable, got {error}") from error
