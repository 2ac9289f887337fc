"""The models of optimise_pattern.py: one small decoder, dense, narrower, or block sparse."""

import argparse
import contextlib
import io

import torch
from optimise_pattern_runs import FROM_SPARSE
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from pytorch_block_sparse import BlockSparseLinear, BlockSparseModelPatcher, Pattern

# Every linear layer of the decoder; the embedding, which is the head too, stays dense.
LINEAR_LAYERS = r"model\.layers\.\d+\..*_proj"


def dense_model(args: argparse.Namespace, seed: int) -> Qwen3ForCausalLM:
    """A freshly initialised decoder."""
    torch.manual_seed(seed)
    heads = max(1, args.hidden // 32)
    heads = next(count for count in range(heads, 0, -1) if args.hidden % count == 0)
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        initializer_range=args.init_std,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


def sparse_model(
    args: argparse.Namespace,
    seed: int,
    density: float,
    block: int,
    masks: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """The same with sparse layers, initialised as such if they are not full.

    Their patterns are random, or those of `masks`.
    """
    model = dense_model(args, seed)
    shape = (block, block)
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(LINEAR_LAYERS, {"density": density, "block_shape": shape})
    with contextlib.redirect_stdout(io.StringIO()):
        replaced = patcher.patch_model(model)
    if density < 1:  # values as wide as so few inputs want
        for name in (layer.name for layer in replaced):
            old = model.get_submodule(name)
            size = (old.out_features, old.in_features)
            if masks is None:
                pattern = Pattern.random(size, density, shape)
            else:
                pattern = Pattern.from_mask(masks[name].cpu(), shape, size)
            new = BlockSparseLinear(old.in_features, old.out_features, False, pattern=pattern)
            nn.init.normal_(new.values, std=model.config.initializer_range / density**0.5)
            model.set_submodule(name, new)
    return model


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def small_model(args: argparse.Namespace, seed: int, density: float, block: int) -> nn.Module:
    """A dense model of the width at which it has about as many parameters as the sparse one."""
    wanted = count(sparse_model(args, seed, density, block))
    widths = range(32, args.hidden + 1, 8)
    options = [argparse.Namespace(**{**vars(args), "hidden": width}) for width in widths]
    with torch.device("meta"):
        counts = [count(dense_model(option, seed)) for option in options]
    best = min(range(len(options)), key=lambda i: abs(counts[i] - wanted))
    return dense_model(options[best], seed)


def make_model(args: argparse.Namespace, masks: dict[str, torch.Tensor] | None) -> nn.Module:
    """The model that a run starts with; `masks` are those of patterns found before."""
    if args.method == "dense":
        return dense_model(args, args.seed)
    if args.method == "dense, small":
        return small_model(args, args.seed, args.density, args.block)
    density = args.density if args.method in FROM_SPARSE else 1.0
    return sparse_model(args, args.seed, density, args.block, masks)
