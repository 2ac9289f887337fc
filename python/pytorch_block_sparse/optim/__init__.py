"""Optimises the pattern of a block-sparse model while it learns.

A method is applied to model and optimizer and stepped after the optimizer::

    sparsifier = BlockSET(model, optimizer, total_steps=10_000)
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()

Each method is one file: ``block_set``, ``block_rigl``, ``gradual_magnitude``, ``block_movement``,
``block_wanda``. They stand on ``sparsifier`` (when), ``layers`` (who), ``scores`` and ``choose``
(which), ``observe`` (what passes through a layer) and ``update`` (the change itself).
``importance`` only measures, ``rates`` knows the learning rate that sparse weights want.
"""

from .block_movement import BlockMovement
from .block_rigl import BlockRigL
from .block_set import BlockSET
from .block_wanda import BlockWanda
from .distillation import DistillationLoss, teacher_of
from .distribution import layer_counts, layer_densities
from .gradual_magnitude import GradualMagnitude
from .importance import BlockImportance
from .rates import parameter_groups
from .schedule import Constant, Cosine, Cubic, Every
from .sparse_optimizer import SparseOptimizer
from .sparsifier import Sparsifier
from .update import Change, compact_, update_pattern_

__all__ = [
    "BlockImportance",
    "BlockMovement",
    "BlockRigL",
    "BlockSET",
    "BlockWanda",
    "Change",
    "Constant",
    "Cosine",
    "Cubic",
    "DistillationLoss",
    "Every",
    "GradualMagnitude",
    "SparseOptimizer",
    "Sparsifier",
    "compact_",
    "layer_counts",
    "layer_densities",
    "parameter_groups",
    "teacher_of",
    "update_pattern_",
]
