"""A whole Llama-like decoder on a GPU, its MLPs block sparse, against the dense one.

Times a forward pass (inference) and a training step (forward, backward, AdamW), eager and with
``torch.compile`` of each layer. The models take turns in one process; medians. ``bound`` is what
Amdahl's law allows: the dense model's time, less what its MLPs' products take, plus what the sparse
ones take, those timed on their own.

Usage: python benchmarks/decoder.py [--layers 8] [--blocks 64x64 32x32] [--density 0.25]
           [--modes eager compile] [--json FILE]
"""

import argparse
import contextlib
import io
import pathlib
import sys

import torch
from gpu import dense_calls, in_turn, normal, pair, sparse_calls, write
from transformers import LlamaConfig, LlamaForCausalLM

from pytorch_block_sparse import BlockSparseModelPatcher, Pattern

MLPS = r"model\.layers\.\d+\.mlp\..*_proj"
FORWARD, TRAINING = ["forward"], ["forward", "grad_input", "grad_weight"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"layers": 8, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8}
    for name, default in (numbers | {"vocab": 32000, "batch": 4, "length": 2048}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--blocks", nargs="+", type=pair, default=[(64, 64), (32, 32)])
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument(
        "--modes", nargs="+", default=["eager", "compile"], choices=["eager", "compile"]
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def decoder(args, block):
    """A freshly initialised decoder in bfloat16; ``block`` of None is dense."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    if block is not None:
        patcher = BlockSparseModelPatcher()
        patcher.add_pattern(MLPS, {"density": args.density, "block_shape": block})
        with contextlib.redirect_stdout(io.StringIO()):
            patcher.patch_model(model)
    return model


def calls_of(model, ids):
    """The two that are timed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    @torch.inference_mode()
    def forward():
        model(ids)

    def training():
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "training": training}


def products_of_mlps(args, block):
    """Microseconds of the products of all MLPs, by the call that they are part of."""
    tokens = args.batch * args.length
    total = {"forward": 0.0, "training": 0.0}
    up, down = (args.intermediate, args.hidden), (args.hidden, args.intermediate)
    with torch.no_grad():
        for shape, layers in ((up, 2 * args.layers), (down, args.layers)):
            x, dy = normal("bfloat16", tokens, shape[1]), normal("bfloat16", tokens, shape[0])
            if block is None:
                calls = dense_calls(x, dy, normal("bfloat16", *shape))
            else:
                pattern = Pattern.random(shape, args.density, block, device="cuda")
                values = normal("bfloat16", pattern.nnz, *block)
                calls = sparse_calls(x, dy, values, pattern)
            times = in_turn(calls, args.repeats, flush=True)
            total["forward"] += layers * sum(times[name] for name in FORWARD)
            total["training"] += layers * sum(times[name] for name in TRAINING)
    return total


def compile_layers(model):
    """Each on its own: they are alike, so that one compilation serves all."""
    for layer in model.model.layers:
        layer.compile()


def measure(args):
    ids = torch.randint(args.vocab, (args.batch, args.length), device="cuda")
    kinds = [None, *args.blocks]
    models = {kind: decoder(args, kind) for kind in kinds}
    products = {kind: products_of_mlps(args, kind) for kind in kinds}
    for mode in args.modes:
        if mode == "compile":
            for model in models.values():
                compile_layers(model)
        calls = {kind: calls_of(model, ids) for kind, model in models.items()}
        for what in ("forward", "training"):
            some = {kind: call[what] for kind, call in calls.items()}
            times = in_turn(some, args.repeats, flush=False)
            for kind in kinds[1:]:
                saved = products[None][what] - products[kind][what]
                yield {
                    "mode": mode,
                    "what": what,
                    "block": kind,
                    "dense_ms": times[None] / 1e3,
                    "ours_ms": times[kind] / 1e3,
                    "speedup": times[None] / times[kind],
                    "bound": times[None] / (times[None] - saved),
                    "mlp_share": products[None][what] / times[None],
                }


def main():
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("decoder.py: there is no NVIDIA GPU here")
    results = []
    for row in measure(args):
        results.append(row)
        print(
            f"{row['mode']:8} {row['what']:9} block {row['block'][0]:3}x{row['block'][1]:<3} "
            f"dense {row['dense_ms']:7.1f} ms, ours {row['ours_ms']:7.1f} ms = "
            f"{row['speedup']:.2f}x, bound {row['bound']:.2f}x "
            f"(MLPs are {100 * row['mlp_share']:.0f} % of the dense time)",
            flush=True,
        )
    if args.json:
        about = {name: value for name, value in vars(args).items() if name not in ("json", "modes")}
        write(args.json, results, **about)


if __name__ == "__main__":
    main()
