"""What a head checks and prepares before its base learner sees anything."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads.errors import InputError


def check_support(
    support: Tensor, labels: Tensor, ways: int | None, mask: Tensor | None, *, needs_every_class: bool
) -> int:
    """Return the number of classes, or raise `InputError`.

    Values are looked at where that costs nothing: on the CPU, and elsewhere when `ways` has to be read off the device
    anyway.
    """
    _check_features("support", support)
    *_, n, d = support.shape
    if n == 0 or d == 0:
        raise InputError("support", _shape(support), "at least one example and one feature, (*batch, n, d)")
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        got = f"a tensor of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError("labels", got, "a tensor of integers 0..ways-1")
    if labels.shape != support.shape[:-1]:
        raise InputError("labels", _shape(labels), f"one label per support example, {tuple(support.shape[:-1])}")
    _check_device("labels", labels, support)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError("mask", got, "a tensor of bool, False at examples to leave out")
        if mask.shape != labels.shape:
            raise InputError("mask", _shape(mask), f"one entry per support example, {tuple(labels.shape)}")
        _check_device("mask", mask, support)
    if ways is not None and (isinstance(ways, bool) or not isinstance(ways, int) or ways < 1):
        raise InputError("ways", repr(ways), "an integer of at least 1, or None")

    if ways is not None and support.device.type != "cpu":
        return ways
    used = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    empty = ~used.any(-1)
    if empty.any():
        raise InputError("mask", f"no example left in {_first(empty)}", "at least one in every task")
    _check_finite("support", support.masked_fill(~used.unsqueeze(-1), 0))
    known = labels.masked_fill(~used, 0)
    if known.numel() and known.min() < 0:
        raise InputError("labels", f"{known.min().item()} in {_first((known < 0).any(-1))}", "values 0..ways-1")
    if ways is None:
        ways = int(known.max().item()) + 1 if known.numel() else 1
    elif (known >= ways).any():
        raise InputError(
            "labels", f"{known.max().item()} in {_first((known >= ways).any(-1))}", f"values 0..{ways - 1}"
        )
    if needs_every_class:
        counts = one_hot(labels, ways, mask, torch.float32).sum(-2)
        if (counts == 0).any():
            *task, missing = (counts == 0).nonzero()[0].tolist()
            where = f" in task {tuple(task)}" if task else ""
            raise InputError(
                "labels", f"no example of class {missing}{where}", f"one at least of each of {ways} classes"
            )
    return ways


def check_query(query: Tensor, support: Tensor) -> None:
    """Raise `InputError` unless `query` goes with the support features of the fit."""
    _check_features("query", query)
    wanted = (*support.shape[:-2], query.shape[-2], support.shape[-1])
    if query.shape != wanted:
        what = "feature size" if query.shape[:-1] == wanted[:-1] else "task dimensions"
        raise InputError("query", _shape(query), f"the {what} of the support, {(*wanted[:-2], 'q', wanted[-1])}")
    _check_device("query", query, support)
    if query.device.type == "cpu":
        _check_finite("query", query)


def check_gram(gram: object, features: Tensor) -> None:
    """Raise `InputError` unless a kernel returned a Gram matrix."""
    wanted = (*features.shape[:-1], features.shape[-2])
    if not isinstance(gram, Tensor) or gram.shape != wanted:
        got = f"shape {tuple(gram.shape)}" if isinstance(gram, Tensor) else type(gram).__name__
        raise InputError("kernel", f"a result of {got}", f"a Gram matrix of shape {wanted}")
    if gram.dtype != features.dtype:
        raise InputError("kernel", f"a result of {gram.dtype}", f"the dtype of its arguments, {features.dtype}")
    if gram.device.type == "cpu":
        _check_finite("kernel", gram)


def one_hot(
    labels: Integer[Tensor, "*batch n"], ways: int, mask: Bool[Tensor, "*batch n"] | None, dtype: torch.dtype
) -> Float[Tensor, "*batch n k"]:
    """One-hot labels, with zero rows where `mask` is False and NaN rows where a label is no class at all."""
    targets = (labels.unsqueeze(-1) == torch.arange(ways, device=labels.device)).to(dtype)
    targets = torch.where(targets.any(-1, keepdim=True), targets, torch.nan)
    return targets if mask is None else targets.masked_fill(~mask.unsqueeze(-1), 0)


def leave_out(gram: Float[Tensor, "*batch n n"], mask: Bool[Tensor, "*batch n"]) -> Float[Tensor, "*batch n n"]:
    """The Gram matrix in which left-out examples are as long as the others on average, and at a right angle to them."""
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    squared = gram.detach().diagonal(dim1=-2, dim2=-1)
    mean = (squared * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return gram.masked_fill(~both, 0) + torch.diag_embed(mean * ~mask)


def _check_features(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(name, got, "a tensor of floating-point features")
    if value.ndim < 2:
        raise InputError(name, _shape(value), "at least two dimensions, (*batch, examples, features)")


def _check_device(name: str, value: Tensor, support: Tensor) -> None:
    if value.device != support.device:
        raise InputError(name, f"device {value.device}", f"the support's device, {support.device}")


def _check_finite(name: str, value: Tensor) -> None:
    if torch.isfinite(value.sum()):  # one pass, and true of almost all that comes
        return
    bad = ~torch.isfinite(value).all(-1)
    if bad.any():
        *task, row = bad.nonzero()[0].tolist()
        where = f" of task {tuple(task)}" if task else ""
        raise InputError(name, f"non-finite values in row {row}{where}", "finite values")


def _first(tasks: Tensor) -> str:
    return f"task {tuple(tasks.nonzero()[0].tolist())}" if tasks.ndim else "the task"


def _shape(value: Tensor) -> str:
    return f"shape {tuple(value.shape)}"
