"""The Python of docs/distributed.md runs on two ranks, block after block, exactly as printed."""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed_helpers import two_processes
from pytorch_block_sparse.distributed.linear import ColwiseLinear, RowwiseLinear

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def read_aloud(rank, folder):
    os.chdir(folder)
    names, models = {"__name__": "__main__"}, []
    for code in BLOCKS:
        exec(compile(code, str(PAGE), "exec"), names)
        models.append(names.get("model"))
    _, ddp, fsdp, _, _, _, tensor = models
    assert type(ddp).__name__ == "DistributedDataParallel"
    assert type(fsdp.up.values).__name__ == "DTensor" and fsdp.up._index.dtype == torch.int32
    assert type(tensor.up) is ColwiseLinear and type(tensor.down) is RowwiseLinear
    wanted = fsdp.up.values.full_tensor()
    if rank == 0:  # where the file was loaded
        assert torch.equal(names["alone"].up.values, wanted)
    return names["state"]


def test_the_page_runs_from_top_to_bottom(tmp_path):
    first, second = two_processes(read_aloud, tmp_path)
    assert first["up.values"].shape == (4, 32, 32)
    for name in first:
        assert torch.equal(first[name], second[name])
