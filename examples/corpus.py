"""Real text that every Python has: the sources of its standard library, as batches of tokens.

Those of packages can be added. Files in the order of their names; every tenth is held out. A
byte-level BPE tokenizer is trained on the others. What is masked is drawn anew for each batch, as
in RoBERTa.
"""

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer

BOS, PAD, EOS, UNK, MASK = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# Tests repeat themselves, tables are no text, and what others installed differs between machines.
EXCLUDED = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "lib2to3", "pydoc_data"),
}


class Batch(NamedTuple):
    """Arguments of a masked language model: -100 labels the tokens that are not predicted."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def source_files(packages: list[str] | None = None) -> list[Path]:
    """The sources of the standard library, in the order of their names; then of `packages`."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in packages or []:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"packages: {name!r} is no package that is installed here")
        roots.append(Path(spec.submodule_search_locations[0]))
    chosen = []
    for root in roots:
        files = (path.relative_to(root) for path in root.rglob("*.py"))
        chosen += [root / path for path in sorted(files) if EXCLUDED.isdisjoint(path.parts)]
    return chosen


def split(files: list[Path]) -> tuple[list[str], list[str]]:
    """The texts to train on, and the held-out ones."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def train_tokenizer(texts: list[str], vocab_size: int) -> ByteLevelBPETokenizer:
    """A byte-level BPE tokenizer, whose special tokens have the ids that RoBERTa expects.

    Special tokens and bytes are 261; the rest are merges, of spaces first.
    """
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    return tokenizer


def sequences(tokenizer: ByteLevelBPETokenizer, texts: list[str], length: int) -> torch.Tensor:
    """The texts one after the other, cut into rows of `length` tokens: [rows, length]."""
    end = tokenizer.token_to_id(EOS)
    ids = [i for text in tokenizer.encode_batch(texts) for i in (*text.ids, end)]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


def mask_tokens(rows: torch.Tensor, generator: torch.Generator) -> Batch:
    """Hide a fifth of the tokens, to be predicted.

    All of them are masked: BERT leaves some as they are, and a model soon copies those, which makes
    the loss fall without anything learnt about the text.
    """
    hidden = torch.rand(rows.shape, generator=generator) < 0.2
    mask = SPECIAL_TOKENS.index(MASK)
    return Batch(rows.masked_fill(hidden, mask), rows.masked_fill(~hidden, -100))


def batches(rows: torch.Tensor, batch_size: int, count: int, seed: int) -> Iterator[Batch]:
    """The same `count` batches for the same seed: rows in random order, over and over."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(count):
        while len(order) < batch_size:
            order = torch.cat((order, torch.randperm(len(rows), generator=generator)))
        picked, order = order.split((batch_size, len(order) - batch_size))
        yield mask_tokens(rows[picked], generator)


def unigram_loss(rows: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """The held-out loss of a model that knows how often each token occurs, and no context."""
    counts = torch.bincount(rows.flatten(), minlength=vocab_size) + 1.0
    return -(counts / counts.sum()).log()[held_out].mean().item()
