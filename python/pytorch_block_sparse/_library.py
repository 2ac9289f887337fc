"""Loads the compiled libraries: ``_C`` (schemas, CPU) always, ``_C_cuda`` where torch has CUDA."""

from importlib.util import find_spec

import torch


def _load() -> None:
    # Looked up by the import system, not by path: it is what makes an editable install rebuild.
    spec = find_spec("pytorch_block_sparse._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            "pytorch_block_sparse: the compiled library _C is missing; install the package "
            "(pip install .) instead of importing its source directory"
        )
    torch.ops.load_library(spec.origin)
    if torch.version.cuda is not None:
        cuda = find_spec("pytorch_block_sparse._C_cuda")
        if cuda is not None and cuda.origin is not None:
            torch.ops.load_library(cuda.origin)


_load()
