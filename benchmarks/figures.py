"""Writes the tables of the README from the results in benchmarks/results, and nothing by hand.

Pages of docs/ include them from there, section by section.

Usage: python benchmarks/figures.py           # rewrite the README
       python benchmarks/figures.py --check   # fail if the README is not what the results say
"""

import json
import math
import pathlib
import statistics
import sys

import bars

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
PRODUCTS = ["forward", "grad_input", "grad_weight"]


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def table(results):
    """Speed-up over the best dense call, the geometric mean over the shapes; worst in brackets."""
    densities = sorted({row["density"] for row in results}, reverse=True)
    yield "| product | tokens | " + " | ".join(f"density {d:g}" for d in densities) + " |"
    yield "|---|---:|" + "---:|" * len(densities)
    for product in PRODUCTS:
        for tokens in sorted({row["tokens"] for row in results if row["product"] == product}):
            cells = []
            for density in densities:
                speedups = [
                    row["speedup"]
                    for row in results
                    if (row["product"], row["tokens"], row["density"]) == (product, tokens, density)
                ]
                cells.append(f"{geometric_mean(speedups):.1f}x ({min(speedups):.1f})")
            yield f"| {product} | {tokens} | " + " | ".join(cells) + " |"


def section(about, results):
    """One table, with what it takes to repeat it."""
    block = "x".join(map(str, about["block"]))
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
    shapes = ", ".join(sorted({f"{row['out']}x{row['in']}" for row in results}))
    clock = "process time" if about["clock"] == "cpu" else "wall time"
    machine = f"{about['cpu']}, {about['capability']}, torch {about['torch']}"
    yield f"**{about['dtype']}, blocks {block}, {threads}**: shapes {shapes}"
    yield f"({machine}, {clock}, {about['date']};"
    yield f"`{about['command']}`)."
    yield ""
    yield from table(results)
    yield ""


def speedups(results, key, columns):
    """Rows for each block and product, with a column for each value of `key`."""
    heads = [value if isinstance(value, str) else f"{key} {value:g}" for value in columns]
    yield "| block | product | " + " | ".join(heads) + " |"
    yield "|---|---|" + "---:|" * len(columns)
    cells = {(tuple(row["block"]), row["product"], row[key]): row["speedup"] for row in results}
    for block, product in dict.fromkeys((tuple(row["block"]), row["product"]) for row in results):
        line = " | ".join(f"{cells[block, product, value]:.2f}x" for value in columns)
        yield f"| {block[0]}x{block[1]} | {product} | {line} |"


def measured_on(about):
    """On what, when, and the command that repeats it."""
    yield f"({about['gpu']}, torch {about['torch']}, {about['date']};"
    yield f"`{about['command']}`)."
    yield ""


def gpu_section(about, results):
    """Speed-up over cuBLAS of each product, by block size and density."""
    densities = sorted({row["density"] for row in results}, reverse=True)
    shape = f"{results[0]['tokens']} tokens, out {results[0]['out']}, in {results[0]['in']}"
    tf32 = ", TF32 allowed," if about.get("tf32") else ""
    yield f"**{about['dtype']} on a GPU**{tf32} against cuBLAS with a full weight, L2 emptied"
    yield f"before each call, {shape} ({about['gpu']}, torch {about['torch']}, {about['date']};"
    yield f"`{about['command']}`)."
    yield ""
    yield from speedups(results, "density", densities)
    yield ""


def few_tokens_section(about, results):
    """Speed-up over cuBLAS of each product with few tokens, by block size and tokens."""
    tokens = sorted({row["tokens"] for row in results})
    first = results[0]
    yield f"**{about['dtype']} on a GPU, few tokens** against cuBLAS with a full weight, a CUDA"
    yield f"graph of layers whose weights L2 cannot hold, density {first['density']:g}, out"
    yield f"{first['out']}, in {first['in']}"
    yield from measured_on(about)
    yield from speedups(results, "tokens", tokens)
    yield ""


def patterns_section(about, results):
    """Speed-up over cuBLAS of each product, by block size and kind of pattern."""
    kinds = list(dict.fromkeys(row["pattern"] for row in results))
    density = results[0]["density"]
    yield f"**Kinds of pattern**, {about['dtype']} on a GPU, density {density:g}, as above"
    yield from measured_on(about)
    yield from speedups(results, "pattern", kinds)
    yield ""


def ampere_section(about, results):
    """Speed-up over cuBLAS of the kernels for other GPUs."""
    yield f"**The kernels for other GPUs**, forced on this one ({about['gpu']}, torch"
    yield f"{about['torch']}, {about['date']};"
    yield f"`{about['command']}`)."
    yield ""
    yield from speedups(results, "density", sorted({row["density"] for row in results}))
    yield ""


def decoder_section(about, results):
    """A whole model: milliseconds, speed-up and what Amdahl's law allows."""
    sizes = f"{about['layers']} layers of {about['hidden']} and {about['intermediate']}"
    yield f"**A whole decoder** (Llama-like, {sizes}, {about['batch']} x {about['length']} tokens,"
    yield f"bfloat16), its MLPs at density {about['density']:g}. Training is forward, backward and"
    yield "AdamW; the bound is Amdahl's for the products alone, and AdamW saves time too"
    yield from measured_on(about)
    yield "| mode | pass | block | dense | ours | speed-up | bound |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for row in results:
        yield (
            f"| {row['mode']} | {row['what']} | {row['block'][0]}x{row['block'][1]} | "
            f"{row['dense_ms']:.1f} ms | {row['ours_ms']:.1f} ms | {row['speedup']:.2f}x | "
            f"{row['bound']:.2f}x |"
        )
    yield ""


def distributed_section(about, results):
    """Tokens per second of each way to train on several GPUs."""
    yield f"**{about['ranks']} GPUs** ({about['device']}, torch {about['torch']}):"
    yield f"{about['layers']} residual MLPs of {about['width']} and {about['hidden']},"
    yield f"{about['tokens']} tokens a step in all, {about['dtype']}, density {about['density']:g},"
    yield f"blocks {about['block']}x{about['block']}"
    yield f"(`torchrun --nproc-per-node {about['ranks']} benchmarks/distributed.py`)."
    yield ""
    yield "| layers | way | a step | tokens a second | against one process |"
    yield "|---|---|---:|---:|---:|"
    for row in results:
        yield (
            f"| {row['kind']} | {row['way']} | {row['milliseconds']:.1f} ms | "
            f"{row['tokens_per_second']:,} | {row['against_one']:.2f}x |"
        )
    yield ""


def bars_section(about, results):
    """What bars.py says of a file, line by line."""
    yield f"**Bars** ({about['cpu']}, {about['capability']}, torch {about['torch']},"
    yield f"{about['date']}; `{about['command']}`): useful rate over the best dense rate, mean"
    yield "and worst cell."
    yield ""
    yield "```"
    yield from (text for text, _ in bars.report([row | about for row in results]))
    yield "```"
    yield ""


def named(name, lines):
    """Lines that a page of docs/ includes by that name."""
    yield f"<!-- --8<-- [start:{name}] -->"
    yield from lines
    yield f"<!-- --8<-- [end:{name}] -->"
    yield ""


SPEEDUP = [
    "How many times faster than the best dense call that torch offers for the same shape, the",
    "fastest of `F.linear` and oneDNN with packed and with plain weights: geometric mean over",
    "the shapes, the worst in brackets. Gradients are held against the dense *forward*. Calls",
    "alternate in one process.",
    "",
]
SECTIONS = {
    "cpu": section,
    "gpu": gpu_section,
    "patterns": patterns_section,
    "few_tokens": few_tokens_section,
    "decoder": decoder_section,
    "sm80": ampere_section,
    "distributed": distributed_section,
    "bars": bars_section,
}


def figures():
    yield BEGIN
    yield "## Measured"
    yield ""
    yield from named("speedup", SPEEDUP)
    for kind, lines in SECTIONS.items():
        for path in sorted((HERE / "results").glob(f"{kind}_*.json")):
            data = json.loads(path.read_text())
            yield from named(path.stem, lines(data["about"], data["results"]))
    yield END


def main():
    text = README.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    wanted = head + "\n".join(figures()) + tail
    if "--check" in sys.argv:
        if text != wanted:
            raise SystemExit(
                "README: its figures are not those of benchmarks/results; "
                "run python benchmarks/figures.py"
            )
        return
    README.write_text(wanted)


if __name__ == "__main__":
    main()
