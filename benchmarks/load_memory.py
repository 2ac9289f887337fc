"""What from_pretrained of a dense and of a sparse checkpoint, and sparsifying while loading, take.

    python benchmarks/load_memory.py [--repeats 6] [--layers 12]

Each load runs in a process of its own. Linux only: memory is RssAnon of /proc/self/status, above
what it is once transformers is imported; pages of the mapped checkpoint do not count.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def anonymous():
    """MB of memory that is not backed by a file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def make(folder, layers):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")


def load(how, folder):
    import torch
    from transformers import LlamaForCausalLM

    from pytorch_block_sparse.integrations import BlockSparseConfig

    torch.set_num_threads(1)
    options, source = {}, "sparse" if how == "sparse" else "dense"
    if how == "sparsify":
        rules = {r"model\.layers\..*_proj": {"density": 0.25}}
        options["quantization_config"] = BlockSparseConfig(rules)
    peak, done, before = [0.0], threading.Event(), anonymous()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder / source, **options)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(
        f"{how:8}  model {size:4.0f} MB  peak {peak[0] - before:4.0f} MB  {seconds:4.1f} s",
        flush=True,
    )
    if how == "sparsify":
        model.save_pretrained(folder / "sparse")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        how, folder = arguments.load
        make(Path(folder) / "dense", arguments.layers) if how == "make" else load(how, Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        for how in ["make", "dense", *["sparsify"] * arguments.repeats, "sparse"]:
            layers = ["--layers", str(arguments.layers)]
            subprocess.run([sys.executable, __file__, *layers, "--load", how, folder], check=True)


if __name__ == "__main__":
    main()
