"""The two bars of a layer: what a call costs on the host, and that it beats the dense one.

Overhead: a tiny layer (64 x 64, one token) against ``nn.Linear``; at most 3x in inference mode, at
most 40 us more in forward + backward. Speed: 3072 x 768 at density 0.25 on 512 tokens against
``F.linear``; at least 1.5x as fast, forward and training step. Prints the median of short runs of
both in turn, in CPU time of the process, which a busy machine disturbs little. The exit status is
1 if a bar is missed.

On a GPU only the host's cost is looked at, in bfloat16: at most 15 us more than ``nn.Linear`` in
inference mode, at most 80 us more in forward + backward.

Usage: python benchmarks/overhead.py [--device cuda]
"""

import argparse
import statistics
import sys
import time

import torch

from pytorch_block_sparse import BlockSparseLinear

REPEATS = 30


def microseconds(call, calls):
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls * 1e6


def compare(ours, dense, calls):
    """Median microseconds a call of each, measured in turn."""
    ours(), dense()  # warm-up
    pairs = [(microseconds(ours, calls), microseconds(dense, calls)) for _ in range(REPEATS)]
    return tuple(statistics.median(times) for times in zip(*pairs, strict=True))


def report(what, ours, dense, figure, kept):
    verdict = "ok" if kept else "MISSED"
    print(f"{what:27} {ours:8.1f} us   dense {dense:8.1f} us   {figure:24} {verdict}")
    return kept


def layers(in_features, out_features, density, tokens, **factory):
    """Calls of a sparse and a dense layer: inference of both, training step of both."""
    x = torch.randn(tokens, in_features, **factory)
    gradient = torch.ones(tokens, out_features, **factory)
    sparse = BlockSparseLinear(in_features, out_features, density=density, **factory)
    dense = torch.nn.Linear(in_features, out_features, **factory)

    def step(layer):
        layer.zero_grad()
        layer(x.detach().requires_grad_()).backward(gradient)

    return (
        (lambda: sparse(x), lambda: dense(x)),
        (lambda: step(sparse), lambda: step(dense)),
    )


def on_gpu():
    """Whether each bar is kept; a GPU that has to be waited for would count as the host's cost."""
    inference, step = layers(64, 64, 0.5, 1, device="cuda", dtype=torch.bfloat16)
    kept = []
    with torch.inference_mode():
        times = {"overhead, inference": (*compare(*inference, 200), 15)}
    times["overhead, forward+backward"] = (*compare(*step, 200), 80)
    for what, (ours, dense, bar) in times.items():
        figure = f"+{ours - dense:.1f} us (at most {bar})"
        kept.append(report(what, ours, dense, figure, ours <= dense + bar))
    return kept


def on_cpu():
    """Whether each bar is kept."""
    kept = []

    inference, step = layers(64, 64, 0.5, 1)
    with torch.inference_mode():
        ours, dense = compare(*inference, 500)
    figure = f"{ours / dense:.2f}x (at most 3x)"
    kept.append(report("overhead, inference", ours, dense, figure, ours <= 3 * dense))
    ours, dense = compare(*step, 500)
    figure = f"+{ours - dense:.1f} us (at most 40)"
    kept.append(report("overhead, forward+backward", ours, dense, figure, ours <= dense + 40))

    inference, step = layers(768, 3072, 0.25, 512)
    with torch.inference_mode():
        times = {"speed, forward": compare(*inference, 1)}
    times["speed, forward+backward"] = compare(*step, 1)
    for what, (ours, dense) in times.items():
        figure = f"{dense / ours:.2f}x (at least 1.5x)"
        kept.append(report(what, ours, dense, figure, 1.5 * ours <= dense))
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    torch.set_num_threads(1)
    return 0 if all(on_cpu() if device == "cpu" else on_gpu()) else 1


if __name__ == "__main__":
    sys.exit(main())
