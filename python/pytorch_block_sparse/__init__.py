"""Block-sparse weights for PyTorch: only the present blocks are stored and multiplied.

Three nouns carry the library: a :class:`Pattern` (which blocks), a :class:`BlockSparseMatrix`
(a pattern and its values) and the products of a linear layer (:mod:`pytorch_block_sparse.ops`).
:class:`BlockSparseLinear` is the layer, :class:`BlockSparseModelPatcher` swaps it into a model.
"""

from importlib.metadata import version

from . import _library, integrations, ops  # noqa: F401  (_library first: it defines the ops)
from .linear import BlockSparseLinear
from .matrix import BlockSparseMatrix
from .patch import BlockSparseModelPatcher
from .pattern import Pattern
from .prepacked import PrepackedLinear
from .quantized import QuantizedBlockSparseLinear, quantize_
from .reference import PseudoBlockSparseLinear
from .view import plot_pattern, summary

__version__ = version("pytorch_block_sparse")

__all__ = [
    "BlockSparseLinear",
    "BlockSparseMatrix",
    "BlockSparseModelPatcher",
    "Pattern",
    "PrepackedLinear",
    "PseudoBlockSparseLinear",
    "QuantizedBlockSparseLinear",
    "ops",
    "plot_pattern",
    "quantize_",
    "summary",
]

integrations.register()
