"""Distillation: a sparse model learns from the dense one that it was. Optional, never required."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .schedule import check_number


class DistillationLoss(nn.Module):
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE, the mean over the tokens that count.

    Hinton et al., arXiv 1503.02531; with these weights as in nn_pruning, whose default for alpha is
    0.9: for language models 0.5 was far better (docs/pattern-optimisation.md). Softmaxes are taken
    in float32.

    Args:
        temperature: T, by which both logits are divided.
        alpha: weight of the teacher.
        ignore_index: labels of tokens that do not count (padding), as in ``cross_entropy``.
        causal: logits at position t are for the label at t + 1 (decoders of transformers shift so):
            the last logit and the first label are dropped.

    Shapes:
        student, teacher: ``[..., classes]``, or whatever has them as ``.logits`` (outputs of
        transformers). labels: ``[...]``, or None: then there is no CE and the loss is the teacher's
        part alone. mask: ``[...]``, True or 1 where a token counts; by default where the label is
        not `ignore_index`.

    Returns:
        A scalar; 0 if no token counts.

    Example:
        >>> import torch
        >>> from pytorch_block_sparse.optim import DistillationLoss
        >>> logits, labels = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
        >>> loss = DistillationLoss(temperature=2.0, alpha=1.0)
        >>> loss(logits, logits, labels).item()
        0.0
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 0.5,
        *,
        ignore_index: int = -100,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature)
        check_number("alpha", alpha)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: must be positive and finite, got {temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must be in [0, 1], got {alpha}")
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.causal = causal

    def forward(
        self, student: Any, teacher: Any, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss; gradients reach the student only."""
        student_logits = _logits("student", student)
        teacher_logits = _logits("teacher", teacher).detach()
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"teacher: logits must be {list(student_logits.shape)} as the student's, got "
                f"{list(teacher_logits.shape)}"
            )
        if self.causal and student_logits.dim() < 2:
            raise ValueError(
                "student: causal wants logits [..., tokens, classes], got "
                f"{list(student_logits.shape)}"
            )
        for name, item in (("labels", labels), ("mask", mask)):
            if item is not None and not isinstance(item, Tensor):
                raise TypeError(f"{name}: must be a tensor, got {type(item).__name__}")
            if item is not None and item.shape != student_logits.shape[:-1]:
                raise ValueError(
                    f"{name}: must be {list(student_logits.shape[:-1])}, got {list(item.shape)}"
                )
        if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise TypeError(f"labels: must be integers, got {labels.dtype}")
        if self.causal:
            student_logits, teacher_logits = (
                student_logits[..., :-1, :],
                teacher_logits[..., :-1, :],
            )
            labels = None if labels is None else labels[..., 1:]
            mask = None if mask is None else mask[..., 1:]
        counts = torch.ones(
            student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device
        )
        if labels is not None:
            counts = labels != self.ignore_index
        if mask is not None:
            counts = counts & mask.bool()
        # Masked by weights and not by indexing: padding costs no round trip to the host.
        weight = counts.float() / counts.sum().clamp(min=1)
        log_student = functional.log_softmax(student_logits.float() / self.temperature, dim=-1)
        log_teacher = functional.log_softmax(teacher_logits.float() / self.temperature, dim=-1)
        share = log_teacher.exp()
        # 0 log 0 is 0, also where both have a logit of minus infinity: a class that is ruled out.
        terms = (share * (log_teacher - log_student)).masked_fill(share == 0, 0)
        divergence = terms.sum(dim=-1)
        soft = self.temperature**2 * _weighted(divergence, weight)
        if labels is None:
            return soft
        entropy = functional.cross_entropy(
            student_logits.float().flatten(0, -2),
            labels.flatten(),
            ignore_index=self.ignore_index,
            reduction="none",
        )
        return self.alpha * soft + (1 - self.alpha) * _weighted(entropy, weight.flatten())


def teacher_of(model: nn.Module) -> nn.Module:
    """A frozen copy of `model`, in eval mode: take it before the model is patched.

    Run it under ``torch.no_grad()``. It shares no memory with the model.

    Example:
        >>> from torch import nn
        >>> from pytorch_block_sparse.optim import teacher_of
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
        >>> teacher = teacher_of(model)
        >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
        (False, False)
    """
    return copy.deepcopy(model).eval().requires_grad_(False)


def _weighted(per_token: Tensor, weight: Tensor) -> Tensor:
    # A token that does not count may be inf or NaN: zero times that would be NaN.
    return (per_token.masked_fill(weight == 0, 0) * weight).sum()


def _logits(name: str, output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name}: must be logits, a tensor, or have them as .logits, got "
            f"{type(output).__name__}"
            + (": pass its logits alone" if isinstance(output, (tuple, list, dict)) else "")
        )
    if logits.dim() == 0:
        raise ValueError(f"{name}: logits must be [..., classes], got a single number")
    return logits
