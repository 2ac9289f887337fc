"""What a call costs on the host: a tiny layer (64 x 64, one token) against ``nn.Linear``.

Targets: at most 3x in inference mode, at most 40 us more in forward + backward. Prints the median
of short runs of both in turn, in CPU time of the process, which a busy machine disturbs little.

Usage: python benchmarks/overhead.py
"""

import statistics
import time

import torch

from pytorch_block_sparse import BlockSparseLinear

CALLS, REPEATS = 500, 30


def microseconds(call):
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


def compare(ours, dense):
    """Median microseconds a call of each, measured in turn."""
    pairs = [(microseconds(ours), microseconds(dense)) for _ in range(REPEATS)]
    return tuple(statistics.median(times) for times in zip(*pairs, strict=True))


def main():
    torch.set_num_threads(1)
    sparse, dense = BlockSparseLinear(64, 64), torch.nn.Linear(64, 64)
    x, gradient = torch.randn(1, 64), torch.ones(1, 64)
    with torch.inference_mode():
        ours, theirs = compare(lambda: sparse(x), lambda: dense(x))
    print(f"inference           {ours:6.1f} us   nn.Linear {theirs:6.1f} us   {ours / theirs:.2f}x")
    ours, theirs = compare(
        lambda: sparse(x).backward(gradient), lambda: dense(x).backward(gradient)
    )
    print(
        f"forward + backward  {ours:6.1f} us   nn.Linear {theirs:6.1f} us   +{ours - theirs:.1f} us"
    )


if __name__ == "__main__":
    main()
