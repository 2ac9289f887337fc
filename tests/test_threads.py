"""Calls from several threads, from a forked process, and on one thread."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pytorch_block_sparse import Pattern, ops
from zoo import normal


def products(seed=0):
    """All three products, large enough to be split among threads."""
    pattern = Pattern.random((512, 384), 0.5, (32, 32), torch.Generator().manual_seed(seed))
    values = normal(pattern.nnz, 32, 32, seed=seed).requires_grad_()
    x = normal(203, 384, seed=seed + 1).requires_grad_()
    y = ops.linear(x, values, pattern.index, None, 512)
    y.pow(2).sum().backward()
    return y.detach(), x.grad, values.grad


def test_concurrent_calls_give_what_one_gives():
    wanted = [products(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(products, range(8)), wanted, strict=True):
                assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_change_the_result(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = products()
        torch.set_num_threads(1)
        assert all(map(torch.equal, got, products()))
    finally:
        torch.set_num_threads(before)


def run(code):
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": os.path.dirname(__file__)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False, env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.split()


def test_the_products_above_use_several_threads():
    code = """
import os, torch
from test_threads import products
torch.set_num_threads(1)
products()
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
products()
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert int(run(code)[0]) >= 3


def test_set_num_threads_1_starts_no_threads():
    """Counts the threads of a fresh process around a product that would be split."""
    code = """
import os, sys, torch
import pytorch_block_sparse
from zoo import normal, pattern_of
torch.set_num_threads(1)
pattern = pattern_of("full", (512, 512), (32, 32))
values, x = normal(pattern.nnz, 32, 32), normal(256, 512)
torch.set_num_threads({threads})
before = len(os.listdir("/proc/self/task"))
pytorch_block_sparse.ops.forward(x, values, pattern.index, None, 512)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run(code.format(threads=1)) == ["0"]
    assert run(code.format(threads=4)) == ["3"]  # or the count above would prove nothing


def test_after_fork():
    """A child of a process that has used its threads works on one, as DataLoader's workers do.

    (On several it hangs, as torch's own products do: the threads of OpenMP do not survive a fork.)
    """
    code = """
import os, signal, torch
from test_threads import products
wanted = products()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a deadlock ends the child
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, products(), wanted)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == ["0"]
