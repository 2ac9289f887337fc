"""Trains a small RoBERTa on the sources of Python's standard library, dense and block sparse.

Both start from the same seed and see the same batches; the sparse one is the same model after three
lines of BlockSparseModelPatcher. The end compares them, writes a picture, saves the sparse model
and loads it in a new process, where its held-out loss must be the same.

    python examples/train_language_model.py             # what `make demo` runs: a few minutes
    python examples/train_language_model.py --quick     # a toy, to see that everything works
"""

import argparse
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import corpus
import report
import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm
from transformers import RobertaConfig, RobertaForMaskedLM

from pytorch_block_sparse import BlockSparseModelPatcher

# Every linear layer of the encoder; the embeddings and the language model's head stay dense.
LINEAR_LAYERS = r"roberta\.encoder\.layer\.\d+\..*\.(query|key|value|dense)"
QUICK = {"hidden": 64, "batch_size": 8, "steps": 24}


@dataclass
class Run:
    """What one training produced."""

    name: str
    model: RobertaForMaskedLM
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    step_seconds: list[float] = field(default_factory=list)


def build_model(args: argparse.Namespace, seed: int, density: float | None) -> RobertaForMaskedLM:
    """A freshly initialised model; with a density, its encoder is block sparse."""
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        max_position_embeddings=args.length + 2,  # RoBERTa counts positions from 2
        type_vocab_size=1,
        hidden_dropout_prob=0.0,  # a short training on much text does not overfit
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
    model = RobertaForMaskedLM(config)
    start_from_waves(model.roberta.embeddings.position_embeddings.weight)
    if density is not None:
        patcher = BlockSparseModelPatcher()
        patcher.add_pattern(LINEAR_LAYERS, {"density": density, "block_shape": (32, 32)})
        patcher.patch_model(model)
    return model


@torch.no_grad()
def start_from_waves(positions: torch.Tensor) -> None:
    """Sines and cosines to start from, in which a shift is one linear map for all positions.

    Learnt positions that start at random leave a short training at the frequencies of the tokens.
    """
    count, width = positions.shape
    frequencies = torch.logspace(0, -math.log10(4 * count), width // 2)
    angles = torch.arange(count)[:, None] * frequencies
    positions.copy_(torch.cat((angles.sin(), angles.cos()), dim=1) * 0.1)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: torch.Tensor, args: argparse.Namespace) -> float:
    """Mean loss over the same held-out batches each time."""
    model.eval()
    losses = [
        model(**batch._asdict()).loss.item()
        for batch in corpus.batches(rows, args.batch_size, 8, seed=args.seed + 1)
    ]
    model.train()
    return sum(losses) / len(losses)


def train(run: Run, rows: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> None:
    """The plainest loop: AdamW, a warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(
        run.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), fused=True
    )
    warm_up = math.ceil(args.steps / 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (args.steps - step) / (args.steps - warm_up + 1)),
    )
    batches = corpus.batches(rows, args.batch_size, args.steps, args.seed)
    progress = tqdm(batches, total=args.steps, desc=run.name, unit="step", mininterval=1)
    for step, batch in enumerate(progress, start=1):
        start = time.perf_counter()
        loss = run.model(**batch._asdict()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.step_seconds.append(time.perf_counter() - start)
        if step % max(1, args.steps // 8) == 0 or step == args.steps:
            run.held_out.append((step, held_out_loss(run.model, held_out, args)))
            progress.set_postfix(held_out_loss=f"{run.held_out[-1][1]:.3f}")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are block sparse in the sparse model, by name, in the order of the model."""
    modules = model.named_modules()
    return {name: layer for name, layer in modules if re.fullmatch(LINEAR_LAYERS, name)}


def save_and_reload(run: Run, args: argparse.Namespace, argv: list[str]) -> tuple[float, float]:
    """The held-out loss of this process's model, and of a new process that loads it."""
    torch.save(run.model.state_dict(), args.out / "model.pt")
    new_process = [sys.executable, __file__, *argv, "--evaluate"]
    output = subprocess.run(new_process, check=True, text=True, stdout=subprocess.PIPE).stdout
    return run.held_out[-1][1], float(output.split()[-1])


def evaluate(args: argparse.Namespace) -> None:
    """Build the model, patch it, load what a training saved, and print the held-out loss."""
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    texts = corpus.split(corpus.source_files())[1]
    # Another seed than the training's, so another pattern: loading brings the right one.
    model = build_model(args, args.seed + 1, args.density)
    model.load_state_dict(torch.load(args.out / "model.pt", weights_only=True))
    print(held_out_loss(model, corpus.sequences(tokenizer, texts, args.length), args))


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; --quick changes the defaults of the others."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--density", type=float, default=0.25, help="share of blocks present")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--layers", type=int, default=2, help="encoder layers")
    # So few: with 512 of them a training this short stays at their frequencies.
    parser.add_argument("--vocab-size", type=int, default=264, help="tokens, bytes included")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=1200, help="training steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its highest value")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--quick", action="store_true", help="a toy model and few steps")
    parser.add_argument("--evaluate", action="store_true", help="only load and evaluate --out")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Both trainings and the comparison, or the evaluation of a saved model."""
    args = parse(argv)
    if args.evaluate:
        evaluate(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)

    files = corpus.source_files()
    texts, held_out_texts = corpus.split(files)
    tokenizer = corpus.train_tokenizer(texts, args.vocab_size)
    tokenizer.save(str(args.out / "tokenizer.json"))
    rows = corpus.sequences(tokenizer, texts, args.length)
    held_out = corpus.sequences(tokenizer, held_out_texts, args.length)
    print(f"{len(files)} files: {rows.numel():,} tokens to train on, {held_out.numel():,} held out")

    dense = Run("dense", build_model(args, args.seed, None))
    sparse = Run("block sparse", build_model(args, args.seed, args.density))
    for run in (dense, sparse):
        train(run, rows, held_out, args)

    layers = [linear_layers(run.model) for run in (dense, sparse)]
    unigram = corpus.unigram_loss(rows, held_out, args.vocab_size)
    report.print_table(dense, sparse, layers, tokens=args.batch_size * args.length)
    print(f"held-out loss of the tokens' frequencies alone, without any context: {unigram:.3f}")
    report.draw(dense, sparse, layers[1], unigram, args.out / "report.png")
    here, there = save_and_reload(sparse, args, argv)
    print(f"held-out loss here {here:.6f}, loaded in a new process {there:.6f}")
    if not math.isclose(here, there, rel_tol=1e-6):
        raise SystemExit("the loaded model is not the one that was saved")


if __name__ == "__main__":
    main(sys.argv[1:])
