"""The comparison that ends the training example: a table of measured figures, and a picture."""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from torch import nn

matplotlib.use("Agg")  # writes files, needs no display
from matplotlib import pyplot

if TYPE_CHECKING:
    from train_language_model import Run


def parameters(modules: list[nn.Module]) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for module in modules for p in module.parameters())


def stored_bytes(modules: list[nn.Module]) -> int:
    """The memory of parameters and buffers (indices), each counted once."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def time_layers(*alternatives: list[nn.Module], tokens: int, repeats: int = 9) -> list[float]:
    """Seconds for forward and backward of each list of layers alone: medians, taken in turns."""
    times: list[list[float]] = [[] for _ in alternatives]
    for _ in range(repeats):
        for layers, seconds in zip(alternatives, times, strict=True):
            total = 0.0
            for layer in layers:
                x = torch.randn(tokens, layer.in_features, requires_grad=True)
                dy = torch.randn(tokens, layer.out_features)
                start = time.perf_counter()
                layer(x).backward(dy)
                total += time.perf_counter() - start
                layer.zero_grad()
            seconds.append(total)
    return [statistics.median(seconds) for seconds in times]


def print_table(
    dense: "Run",
    sparse: "Run",
    linear_layers: list[dict[str, nn.Module]],
    tokens: int,
) -> None:
    """One row for each quantity: dense, block sparse, and their ratio."""
    runs = (dense, sparse)
    layers = [list(by_name.values()) for by_name in linear_layers]
    seconds = time_layers(*layers, tokens=tokens)
    tail = max(1, len(dense.losses) // 10)
    rows = [
        ("linear layers: parameters", [parameters(x) for x in layers], "{:,}"),
        ("linear layers: bytes, with indices", [stored_bytes(x) for x in layers], "{:,}"),
        ("linear layers: ms per step, alone", [1e3 * s for s in seconds], "{:.1f}"),
        ("model: parameters", [parameters([run.model]) for run in runs], "{:,}"),
        ("model: ms per step", [1e3 * statistics.median(r.step_seconds) for r in runs], "{:.1f}"),
        ("train loss, first step", [run.losses[0] for run in runs], "{:.3f}"),
        (f"train loss, last {tail}", [statistics.mean(r.losses[-tail:]) for r in runs], "{:.3f}"),
        ("held-out loss", [run.held_out[-1][1] for run in runs], "{:.3f}"),
    ]
    print(f"\n{f'{tokens} tokens per step':36}{dense.name:>14}{sparse.name:>14}{'ratio':>8}")
    for label, values, form in rows:
        cells = "".join(f"{form.format(value):>14}" for value in values)
        print(f"{label:36}{cells}{values[1] / values[0]:8.2f}")
    print("alone: forward and backward of these layers by themselves, medians taken in turns\n")


def draw(
    dense: "Run",
    sparse: "Run",
    sparse_layers: dict[str, nn.Module],
    unigram: float,
    path: Path,
) -> None:
    """The loss curves beside what no context gives, and the pattern of one layer."""
    figure, (curves, picture) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    window = max(1, len(dense.losses) // 50)
    for run, color in ((dense, "tab:blue"), (sparse, "tab:orange")):
        steps = range(window, len(run.losses) + 1, window)
        means = [statistics.mean(run.losses[step - window : step]) for step in steps]
        curves.plot(steps, means, color=color, alpha=0.4)
        curves.plot(*zip(*run.held_out, strict=True), "o-", color=color, label=run.name)
    label = "frequencies of the tokens alone"
    curves.axhline(unigram, color="gray", linestyle="--", label=label)
    # The first steps fall from far above; what comes after them is of interest.
    losses = [loss for run in (dense, sparse) for _, loss in run.held_out]
    curves.set_ylim(top=max(*losses, unigram) + 0.3 * (max(*losses, unigram) - min(losses)))
    title = f"masked language model: held out; train, means of {window} steps (faint)"
    curves.set(xlabel="step", ylabel="loss", title=title)
    curves.legend()

    name, layer = list(sparse_layers.items())[-1]
    pattern = layer.pattern
    picture.imshow(pattern.mask().cpu(), cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
    size = "x".join(map(str, pattern.block_shape))
    picture.set(
        xlabel="block column (in)",
        ylabel="block row (out)",
        title=f"{name}\n{pattern.nnz} blocks of {size} (black), density {pattern.density:.2f}",
    )
    figure.savefig(path, dpi=120)
    print(f"loss curves and a pattern: {path}")
