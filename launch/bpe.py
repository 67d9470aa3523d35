"""Byte-level BPE vocabularies: trained on a corpus of text, which they turn into token ids."""

import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import BYTE_VOCAB, Corpus, Tokens, load_corpus
from out_folder import replacing

# Ids are stored as uint16, and `data_formats` takes 65,535 for padding.
MAX_VOCAB = 2**16 - 1
# Pieces of text are encoded in parallel; a batch of them is in memory at once.
PIECE_CHARACTERS, PIECES_AT_ONCE = 2**17, 256
TOKENIZER, SOURCE = "tokenizer.json", "source.json"


def encoded_corpus(corpus: Corpus, vocab_size: int, folder: Path, seq_len: int) -> Corpus:
    """Encode a corpus of text by a byte-level BPE vocabulary that is trained on its training part.

    Decoding gives back the text, but for bytes that are not UTF-8, which are replaced by U+FFFD.
    (Sennrich et al. 2016, arXiv:1508.07909, on bytes.) Vocabulary and ids are kept in `folder`, and
    used again for the same text and vocabulary size.

    Args:
        corpus: its tokens are bytes.
        vocab_size: number of token ids, 256 to 65,535.
        folder: where to write tokenizer.json, train.bin and val.bin, uint16 little-endian.
        seq_len: see `load_corpus`.

    Raises:
        ValueError: the corpus is no text, there is no package `tokenizers`, `vocab_size` is out of
            range or more than the text gives rise to, or a stream is shorter than a sequence.
    """
    if not corpus.is_text:
        raise ValueError(f"--bpe-vocab must be given for text only, got ids from {corpus.source}")
    check_vocab_size(vocab_size)
    streams = {"train": corpus.train, "val": corpus.validation}
    source = {"vocab_size": vocab_size} | {
        name: hashlib.sha256(stream.tobytes()).hexdigest() for name, stream in streams.items()
    }
    files = [folder / f"{name}.bin" for name in streams]
    if _read_json(folder / SOURCE) != source or not all(file.is_file() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        _encode(streams, vocab_size, folder)
        # Last, so that an interrupted call leaves nothing that is taken for complete.
        with replacing(folder / SOURCE) as file:
            file.write(json.dumps(source).encode())
    return load_corpus(folder, seq_len, vocab_size)


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError unless it holds all bytes, ids fit uint16, and `tokenizers` is there."""
    if not BYTE_VOCAB <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"--bpe-vocab must be from {BYTE_VOCAB} to {MAX_VOCAB:,} (ids are uint16), "
            f"got {vocab_size:,}"
        )
    if find_spec("tokenizers") is None:
        raise ValueError("--bpe-vocab must be left out without the package tokenizers")


def _encode(streams: dict[str, Tokens], vocab_size: int, folder: Path) -> None:
    """Train the vocabulary on the first stream of bytes; write it, and the ids of all streams."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(streams["train"]), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"--bpe-vocab must be at most {found:,} for a text of {len(streams['train']):,} bytes, "
            f"got {vocab_size:,}"
        )
    with replacing(folder / TOKENIZER) as file:
        file.write(tokenizer.to_str().encode())
    for name, stream in streams.items():
        pieces = list(_pieces(stream))
        with replacing(folder / f"{name}.bin") as file:
            for start in range(0, len(pieces), PIECES_AT_ONCE):
                for encoding in tokenizer.encode_batch_fast(pieces[start : start + PIECES_AT_ONCE]):
                    file.write(np.array(encoding.ids, dtype="<u2").tobytes())


def _pieces(stream: Tokens) -> Iterator[str]:
    """Cut a stream of bytes into pieces of text, each at the end of a line where it has one."""
    text = stream.tobytes().decode("utf-8", errors="replace")
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
