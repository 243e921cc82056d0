"""What a head checks and prepares before its base learner sees anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads.errors import InputError, SolverError, described, is_count
from convexheads.precision import is_dense, is_of_floats, is_of_integers, kind

# More classes than this are labels that nobody renumbered, and would fill the memory.
_MOST_WAYS = 2**20


def check_support(
    support: Tensor, labels: Tensor, ways: int | Tensor | None, mask: Tensor | None, *, needs_every_class: bool
) -> int:
    """Return the number of classes (the largest, where `ways` says that of each task), or raise `InputError`.

    Values are looked at where that costs nothing: on the CPU, and elsewhere when `ways` has to be read off the device
    anyway.
    """
    check_examples(support, mask)
    if not is_of_integers(labels):
        raise InputError("labels", kind(labels), "a tensor of integers 0..ways-1")
    labels = labels.long()  # torch can't look into its unsigned types
    if labels.shape == support.shape[: labels.ndim] and support.ndim > labels.ndim + 1:
        raise InputError("support", _shape(support), f"flat features, {(*labels.shape, 'd')}".replace("'", ""))
    if labels.shape != support.shape[:-1]:
        raise InputError("labels", _shape(labels), f"one label per support example, {tuple(support.shape[:-1])}")
    _check_device("labels", labels, support)
    if isinstance(ways, Tensor):
        if ways.shape != labels.shape[:-1] or not is_of_integers(ways):
            got = f"a tensor of {ways.dtype}, shape {tuple(ways.shape)}"
            raise InputError("ways", got, f"integers, one a task, {tuple(labels.shape[:-1])}")
        _check_device("ways", ways, support)
        ways = ways.long()
        if (ways < 1).any():
            raise InputError("ways", f"{ways[ways < 1][0].item()} in {first(ways < 1)}", "at least 1")
    elif ways is not None and not is_count(ways):
        raise InputError("ways", described(ways), "an integer of at least 1, a tensor of them, or None")

    if isinstance(ways, int):
        _check_most(ways)
        if support.device.type != "cpu":
            return ways
    used = check_values(support, mask)
    known = labels.masked_fill(~used, 0)
    if known.numel() and known.min() < 0:
        wanted = f"values 0..{ways - 1}" if isinstance(ways, int) else "values 0..ways-1"
        raise InputError("labels", f"{known[known < 0][0].item()} in {first((known < 0).any(-1))}", wanted)
    if ways is None:
        ways = int(known.max().item()) + 1 if known.numel() else 1
    limit = ways.unsqueeze(-1) if isinstance(ways, Tensor) else ways
    if (known >= limit).any():
        label, task = known[known >= limit][0].item(), first((known >= limit).any(-1))
        wanted = "values 0..ways-1" if isinstance(ways, Tensor) else f"values 0..{ways - 1}"
        raise InputError("labels", f"{label} in {task}", wanted)
    most = ways if isinstance(ways, int) else int(ways.max().item()) if ways.numel() else 1
    _check_most(most)
    if needs_every_class:
        counts = one_hot(labels, most, mask, torch.float32).sum(-2)
        missing = (counts == 0) & (torch.arange(most, device=labels.device) < limit)
        if missing.any():
            *task, missing = missing.nonzero()[0].tolist()
            where = f" in task {tuple(task)}" if task else ""
            of = "its classes" if isinstance(ways, Tensor) else f"{ways} classes"
            raise InputError("labels", f"no example of class {missing}{where}", f"one at least of each of {of}")
    return most


def _check_most(ways: int) -> None:
    if ways > _MOST_WAYS:
        raise InputError("ways", ways, f"at most {_MOST_WAYS}; without ways= it is the largest label plus one")


def check_examples(support: Tensor, mask: Tensor | None) -> None:
    """Raise `InputError` unless these are features, with a mask that goes with them."""
    _check_features("support", support)
    *batch, n, d = support.shape
    if n == 0 or d == 0:
        raise InputError("support", _shape(support), "at least one example and one feature, (*batch, n, d)")
    if mask is not None:
        if not is_dense(mask) or mask.dtype != torch.bool:
            raise InputError("mask", kind(mask), "a tensor of bool, False at examples to leave out")
        if mask.shape != (*batch, n):
            raise InputError("mask", _shape(mask), f"one entry per support example, {(*batch, n)}")
        _check_device("mask", mask, support)


def check_targets(targets: object, support: Tensor, mask: Tensor | None) -> bool:
    """Raise `InputError` unless these are values to regress on; return whether they lack a dimension of outputs."""
    check_examples(support, mask)
    if not is_of_floats(targets):
        raise InputError("targets", kind(targets), "a tensor of floating-point values")
    flat = targets.shape == support.shape[:-1]
    if not flat and (targets.ndim != support.ndim or targets.shape[:-1] != support.shape[:-1] or not targets.shape[-1]):
        wanted = f"one value, or one row of values, per support example, {tuple(support.shape[:-1])} or with outputs"
        raise InputError("targets", _shape(targets), wanted)
    _check_device("targets", targets, support)
    if support.device.type == "cpu":
        used = check_values(support, mask)
        check_finite("targets", (targets.unsqueeze(-1) if flat else targets).masked_fill(~used.unsqueeze(-1), 0))
    return flat


def check_values(support: Tensor, mask: Tensor | None) -> Tensor:
    """Raise `InputError` unless every task has examples, all of them finite; return which are used, `(*batch, n)`."""
    if mask is None:
        check_finite("support", support)
        return torch.ones(support.shape[:-1], dtype=torch.bool, device=support.device)
    empty = ~mask.any(-1)
    if empty.any():
        raise InputError("mask", f"no example left in {first(empty)}", "at least one in every task")
    check_finite("support", support.masked_fill(~mask.unsqueeze(-1), 0))
    return mask


def check_query(query: Tensor, support: Tensor) -> None:
    """Raise `InputError` unless `query` goes with the support features of the fit."""
    _check_features("query", query)
    wanted = (*support.shape[:-2], query.shape[-2], support.shape[-1])
    if query.shape != wanted:
        what = "feature size" if query.shape[:-1] == wanted[:-1] else "task dimensions"
        raise InputError(
            "query", _shape(query), f"the {what} of the support, {(*wanted[:-2], 'q', wanted[-1])}".replace("'", "")
        )
    _check_device("query", query, support)
    if query.device.type == "cpu":
        check_finite("query", query)


def check_gram(gram: object, features: Tensor, others: Tensor) -> None:
    """Raise `InputError` unless a kernel returned a Gram matrix of the two; on the CPU, of finite values."""
    wanted = (*features.shape[:-1], others.shape[-2])
    if not isinstance(gram, Tensor) or gram.shape != wanted:
        got = f"shape {tuple(gram.shape)}" if isinstance(gram, Tensor) else type(gram).__name__
        raise InputError("kernel", f"a result of {got}", f"a Gram matrix of shape {wanted}")
    if gram.dtype != features.dtype:
        raise InputError("kernel", f"a result of {gram.dtype}", f"the dtype of its arguments, {features.dtype}")
    if gram.device.type == "cpu":
        check_finite("kernel", gram)


def check_finite(name: str, value: Tensor) -> None:
    """Raise `InputError`, which names the row, where a value is not finite."""
    inspect_values(_check_finite, name, value)


def _check_finite(name: str, value: Tensor) -> None:
    if torch.isfinite(value.sum()):  # one pass, and true of almost all that comes
        return
    bad = ~torch.isfinite(value).all(-1)
    if bad.any():
        *task, row = bad.nonzero()[0].tolist()
        where = f" of task {tuple(task)}" if task else ""
        raise InputError(name, f"non-finite values in row {row}{where}", "finite values")


@contextmanager
def failing_on_indefinite(gram: Tensor) -> Iterator[None]:
    """Where a base learner fails in here, look for the likely reason, which has a clearer error."""
    try:
        yield
    except SolverError:
        check_definite(gram)
        raise


def check_definite(gram: Tensor) -> None:
    """Raise `InputError` where a Gram matrix has an eigenvalue that is negative beyond rounding."""
    inspect_values(_check_definite, gram)


def _check_definite(gram: Tensor) -> None:
    finite = torch.isfinite(gram).all(-1).all(-1)[..., None, None]  # elsewhere torch would raise an error of its own
    values = torch.linalg.eigvalsh(gram.where(finite, 0))
    smallest, size = values[..., 0], values.abs().amax(-1)
    negative = smallest < -1e-9 * size
    if negative.any():
        got = f"a Gram matrix with the eigenvalue {smallest[negative][0].item():.3g} in {first(negative)}"
        raise InputError("kernel", got, "a positive semi-definite kernel")


def one_hot(
    labels: Integer[Tensor, "*batch n"], ways: int, mask: Bool[Tensor, "*batch n"] | None, dtype: torch.dtype
) -> Float[Tensor, "*batch n k"]:
    """One-hot labels, with zero rows where `mask` is False and NaN rows where a label is no class at all."""
    targets = (labels.unsqueeze(-1) == torch.arange(ways, device=labels.device)).to(dtype)
    targets = torch.where(targets.any(-1, keepdim=True), targets, torch.nan)
    return targets if mask is None else targets.masked_fill(~mask.unsqueeze(-1), 0)


def label_all(targets: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
    """One-hot labels, with one for every left-out example too: at a right angle to all others, any will do."""
    return torch.cat([targets[..., :1] + 1 - targets.sum(-1, keepdim=True), targets[..., 1:]], -1)


def leave_out(gram: Float[Tensor, "*batch n n"], mask: Bool[Tensor, "*batch n"]) -> Float[Tensor, "*batch n n"]:
    """The Gram matrix in which left-out examples are as long as the others on average, and at a right angle to them."""
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    squared = gram.detach().diagonal(dim1=-2, dim2=-1)
    mean = (squared * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return gram.masked_fill(~both, 0) + torch.diag_embed(mean * ~mask)


def _check_features(name: str, value: object) -> None:
    if not is_of_floats(value):
        raise InputError(name, kind(value), "a tensor of floating-point features")
    if value.ndim < 2:
        raise InputError(name, _shape(value), "at least two dimensions, (*batch, examples, features)")


def _check_device(name: str, value: Tensor, support: Tensor) -> None:
    if value.device != support.device:
        raise InputError(name, f"device {value.device}", f"the support's device, {support.device}")


def first(tasks: Tensor) -> str:
    """The first of the tasks of which this is true, in words."""
    return f"task {tuple(tasks.nonzero()[0].tolist())}" if tasks.ndim else "the task"


def _shape(value: Tensor) -> str:
    return f"shape {tuple(value.shape)}"
