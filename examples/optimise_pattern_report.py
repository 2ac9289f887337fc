"""What came out of optimise_pattern.py: the table, means over the seeds, and the picture."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from optimise_pattern_runs import FROM_SPARSE, METHODS, Result, Run


class Cell(NamedTuple):
    """Runs that differ in nothing but their seed: mean and spread of their losses, medians."""

    run: Result
    mean: float
    spread: float
    seeds: int
    parameters: int
    seconds: float
    pattern_share: float


def named(run: Result, separator: str = ", ") -> str:
    """The method, and its options where they are not the defaults."""
    options = (f"{name} {value}" for name, value in run["options"].items())
    return separator.join([run["method"], *options])


def summary(results: list[Result]) -> list[Cell]:
    """One cell for all seeds, in the order of densities, blocks and METHODS."""
    groups: dict[str, list[Result]] = {}
    names = [name for name in Run.__annotations__ if name != "seed"]
    for line in results:
        run = {name: line[name] for name in names}
        groups.setdefault(json.dumps(run), []).append(line)
    cells = []
    for lines in groups.values():
        losses = [line["loss"] for line in lines]
        cell = Cell(
            lines[0],
            statistics.fmean(losses),
            statistics.stdev(losses) if len(losses) > 1 else float("nan"),
            len(losses),
            lines[0]["parameters"],
            statistics.median(line["seconds"] for line in lines),
            statistics.median(line["pattern_share"] for line in lines),
        )
        cells.append(cell)

    def order(cell: Cell) -> tuple[float, int, int]:
        return -cell.run["density"], -cell.run["block"], METHODS.index(cell.run["method"])

    return sorted(cells, key=order)


def print_table(results: list[Result]) -> None:
    """The table, as Markdown."""
    print(
        "| method | density | block | rate | parameters | held-out loss | spread | seeds | s "
        "| pattern work |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for cell in summary(results):
        run = cell.run
        print(
            f"| {named(run)} | {run['density']:g} | {run['block'] or ''} "
            f"| {run['learning_rate']:g} | {cell.parameters:,} | {cell.mean:.4f} "
            f"| {cell.spread:.4f} | {cell.seeds} | {cell.seconds:.0f} "
            f"| {100 * cell.pattern_share:.1f} % |"
        )


def main_cells(results: list[Result]) -> dict[tuple[str, float, int], Cell]:
    """For each method, density and block the cell without options, or with most seeds.

    The others, checks of a learning rate or an option, are in the table and not in the picture.
    """
    found: dict[tuple[str, float, int], Cell] = {}

    def rank(cell: Cell) -> tuple[bool, int]:
        return not cell.run["options"], cell.seeds

    for cell in summary(results):
        key = (cell.run["method"], cell.run["density"], cell.run["block"])
        if key not in found or rank(cell) > rank(found[key]):
            found[key] = cell
    return found


def draw(results: list[Result], path: Path) -> None:
    """Loss over density, one panel for each block size."""
    from matplotlib.figure import Figure

    table = main_cells(results)
    blocks = sorted({block for _, _, block in table if block}) or [0]
    densities = sorted({density for method, density, _ in table if method != "dense"})
    methods = [method for method in METHODS if any(method == name for name, _, _ in table)]
    figure = Figure(figsize=(4.4 * len(blocks) + 2, 4.4), layout="constrained")
    axes = figure.subplots(1, len(blocks), squeeze=False, sharey=True)[0]
    for ax, block in zip(axes, blocks, strict=True):
        for number, method in enumerate(methods):
            color = "black" if method == "dense" else f"C{METHODS.index(method) - 1}"
            if method == "dense":
                ax.axhline(table[method, 1.0, 0].mean, color=color, label=method)
                continue
            # `dense, small` has no blocks: what was run for one size is in all panels.
            cells = [
                (densities.index(density), cell)
                for (name, density, size), cell in table.items()
                if name == method and (size == block or name == "dense, small")
            ]
            if not cells:
                continue
            ax.errorbar(
                [x + 0.07 * (number - len(methods) / 2) for x, _ in cells],  # side by side
                [cell.mean for _, cell in cells],
                yerr=[cell.spread for _, cell in cells],
                label=named(cells[0][1].run, "\n  "),
                marker="o",
                markersize=5,
                linewidth=1,
                linestyle=":" if method in FROM_SPARSE else "-",
                capsize=2,
                color=color,
            )
        ax.set_title(f"blocks of {block} x {block}")
        ax.set_xticks(range(len(densities)), [f"{density:g}" for density in densities])
        ax.set_xlabel("density")
        ax.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("held-out loss")
    legend = {}  # one for all panels: a method may be in one of them only
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=120)
