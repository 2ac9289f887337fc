"""Plots of what gpu.py measured: speed-up over density, or time over tokens where they vary.

Usage: python benchmarks/gpu_plots.py RESULTS.json [RESULTS.json ...] --plot FILE

Needs no GPU. Results of several files are drawn as one.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PRODUCTS = ["forward", "grad_input", "grad_weight"]
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second, from NVIDIA's data sheets


def plot(results, about, path):
    """Of the first shape and kind of pattern among them. `about`: the GPU and the dtype."""
    first = [results[0][name] for name in ("out", "in", "pattern")]
    results = [row for row in results if [row[n] for n in ("out", "in", "pattern")] == first]
    by_tokens = len({row["tokens"] for row in results}) > 1
    figure = over_tokens(results, **about) if by_tokens else over_density(results)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def lines(rows, x, y):
    """A name and its points for each block size."""
    for block in dict.fromkeys(tuple(row["block"]) for row in rows):
        points = {row[x]: row[y] for row in rows if tuple(row["block"]) == block}
        yield f"{block[0]}x{block[1]}", sorted(points.items())


def panels(results, title):
    """A figure with a panel for each product: ``figure, [(axis, its rows), ...]``."""
    products = [name for name in PRODUCTS if any(row["product"] == name for row in results)]
    figure, axes = plt.subplots(
        1, len(products), figsize=(4.5 * len(products), 4), sharey=True, squeeze=False
    )
    figure.suptitle(f"{title}, out {results[0]['out']}, in {results[0]['in']}")
    rows = [[row for row in results if row["product"] == name] for name in products]
    for axis, name in zip(axes[0], products, strict=True):
        axis.set(xscale="log", yscale="log", title=name)
    return figure, list(zip(axes[0], rows, strict=True))


def ticks(axis, values):
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.set_xticks([], minor=True)


def over_density(results):
    """Speed-up, a line for each block size."""
    figure, drawn = panels(results, f"{results[0]['tokens']} tokens")
    for axis, rows in drawn:
        for name, points in lines(rows, "density", "speedup"):
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        densities = sorted({row["density"] for row in rows})
        axis.plot(densities, [1 / d for d in densities], ":", color="gray", label="1 / density")
        axis.axhline(1, color="black", linewidth=1, label="cuBLAS dense")
        axis.set_xlabel("density")
        ticks(axis, densities)
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    first = drawn[0][0]
    first.set_ylabel("times as fast as dense")
    first.legend(fontsize="small")
    return figure


def over_tokens(results, gpu, dtype):
    """Time, a line for each block size, with what memory allows."""
    density = results[0]["density"]
    results = [row for row in results if row["density"] == density]
    figure, drawn = panels(results, f"{gpu}, density {density:g}")
    size = 4 if dtype == "float32" else 2
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in gpu), None)
    for axis, rows in drawn:
        for name, points in lines(rows, "tokens", "ours_us"):
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        tokens = sorted({row["tokens"] for row in rows})
        dense = {row["tokens"]: row["dense_us"] for row in rows}
        axis.plot(tokens, [dense[n] for n in tokens], color="black", label="cuBLAS dense")
        out, into = rows[0]["out"], rows[0]["in"]
        for share, of, style in ((1, "dense", "--"), (density, "ours", ":")):
            if bandwidth is None:
                continue
            least = [
                1e6 * size * (out * into * share + n * (out + into)) / bandwidth for n in tokens
            ]
            axis.plot(tokens, least, style, color="gray", label=f"memory's limit, {of}")
        axis.set(xlabel="tokens", ylim=(4, None))
        ticks(axis, [n for n in tokens if n & (n - 1) == 0])
        times = [5, 10, 20, 50, 100, 200]
        axis.set_yticks(times, [str(time) for time in times])
        axis.set_yticks([], minor=True)
    first = drawn[0][0]
    first.set_ylabel("microseconds")
    first.legend(fontsize="x-small", loc="lower right")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path, required=True)
    args = parser.parse_args(argv)
    files = [json.loads(path.read_text()) for path in args.results]
    rows = [row for file in files for row in file["results"]]
    about = {name: files[0]["about"][name] for name in ("gpu", "dtype")}
    plot(rows, about, args.plot)


if __name__ == "__main__":
    main()
