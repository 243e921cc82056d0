"""The argument and the result of `Head.solve`: support sets and kernel expansions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional

from convexheads._functorch import inspect_values, is_recorded
from convexheads._validation import check_finite, check_similarity
from convexheads.errors import InputError
from convexheads.heads._sharing import apply_once
from convexheads.kernels import Kernel, KernelLike, Linear, compute_gram
from convexheads.kernels.linear import affine_form
from convexheads.solvers.native.active_set import numba_is_installed
from convexheads.solvers.problem import Solution, TensorRecord

_E = TypeVar("_E", bound="KernelExpansion")
# For fewer multiplications, loading compiled code takes longer than it saves. For more examples, BLAS is as fast.
_MIN_OPERATIONS_TO_COMPILE = 2**24
_MAX_EXAMPLES_TO_COMPILE = 128


@dataclass(frozen=True, eq=False, repr=False)
class SupportSet:
    """The support sets of a batch of tasks, as `Head.solve` receives them: checked, and in float64.

    Attributes:
        features: `(*batch, n, d)`; zero at masked examples.
        targets: one-hot labels, or the values to regress on, `(*batch, n, k)`; zero at masked examples.
        mask: `(*batch, n)`, False at examples to ignore. Defaults to None (no mask).
        kernel: the head's kernel, with its parameters fixed for these support sets. Defaults to `Linear()`.
        validate: whether to check values. Defaults to True.
        sample_weight: factors of the losses of the examples, `(*batch, n)`, positive where there is no mask. Defaults
            to None (all one).
        is_multilabel: whether an example may have any number of labels, each of which is a problem of its own. Defaults
            to False.
        prior: weights `(*batch, k, d)` from which the regularizer measures. Defaults to None (zero).
        init: the solution of a similar problem, where an iterative solver begins. Defaults to None.
        needs_similarity: whether a kernel that is a distance is an error. Defaults to True.

    Example:
        `RidgeHead().solve(SupportSet(features, targets)).coef`
    """

    features: Float[Tensor, "*batch n d"]
    targets: Float[Tensor, "*batch n k"]
    mask: Bool[Tensor, "*batch n"] | None = None
    kernel: KernelLike = field(default_factory=Linear)
    validate: bool = True
    sample_weight: Float[Tensor, "*batch n"] | None = None
    prior: Float[Tensor, "*batch k d"] | None = None
    is_multilabel: bool = False
    init: Solution | None = None
    needs_similarity: bool = True

    def checked_init(self, shape: Sequence[int]) -> Solution | None:
        """The `init`, whose coefficients must have this `shape`; otherwise an `InputError` is raised."""
        if self.init is not None and self.init.coef.shape != torch.Size(shape):
            got = f"coefficients of shape {tuple(self.init.coef.shape)}"
            raise InputError("init", f"a solution with coefficients of shape {tuple(shape)}", got)
        return self.init

    def start_coef(self, shape: Sequence[int]) -> Tensor | None:
        """The coefficients of `init`, of this `shape`, without gradient, and zero in failed tasks; None without it."""
        init = self.checked_init(shape)
        return None if init is None else init.coef.detach().to(self.targets).nan_to_num(0, 0, 0)

    @property
    def gram(self) -> Float[Tensor, "*batch n n"]:
        """The Gram matrix `kernel(features, features)`, `(*batch, n, n)`, computed on first use.

        Masked examples are orthogonal to all others, and their squared length is the mean over the others.
        """
        known = vars(self)  # the lock of a `cached_property` cannot be traced by `torch.compile`
        if "_gram" not in known:
            gram = self._linear_gram()
            if gram is None:
                gram = compute_gram(self.kernel, self.features, self.features, validate=self.validate)
                is_known = isinstance(self.kernel, Kernel | partial)  # the library's kernels are symmetric
                if self.validate and not is_known:
                    inspect_values(partial(check_similarity, allow_distances=not self.needs_similarity), gram)
            known["_gram"] = gram if self.mask is None else _mask_gram(gram, self.mask)
        return known["_gram"]

    def _linear_gram(self) -> Tensor | None:
        """The Gram matrix of an affine kernel where tasks share their features or are many; None for others."""
        compiles = _is_for_compiled_code(self.features)
        if not compiles and all(self.features.stride()[:-2]):
            return None
        form = affine_form(self.kernel, self.features.shape[-1])
        if form is None:
            return None
        slope, constant = (part[..., None, None] if isinstance(part, Tensor) else part for part in form)
        product = _compiled_product if compiles else lambda features: features @ features.mT
        gram = slope * apply_once(product, self.features) + constant
        if self.validate:
            check_finite("kernel", gram)
        return gram

    @property
    def linear_factor(self) -> float | Float[Tensor, "*#batch 1 1"] | None:
        """The r of a kernel that is the dot product of `r * x` and `r * y`; None for all other kernels."""
        form = affine_form(self.kernel, self.features.shape[-1])
        if form is None or isinstance(form[1], Tensor) or form[1] != 0:
            return None
        slope = form[0]
        return slope.sqrt()[..., None, None] if isinstance(slope, Tensor) else slope**0.5

    @property
    def used(self) -> Bool[Tensor, "*batch n"]:
        """Which examples are not masked, `(*batch, n)`."""
        return torch.ones_like(self.targets[..., 0], dtype=torch.bool) if self.mask is None else self.mask

    @property
    def factors(self) -> Float[Tensor, "*batch n"]:
        """The factor of each example's loss, `(*batch, n)`: its weight, or zero if it is masked."""
        weight = torch.ones_like(self.targets[..., 0]) if self.sample_weight is None else self.sample_weight
        return weight if self.mask is None else weight * self.mask

    @property
    def offset(self) -> Float[Tensor, "*batch n k"]:
        """The scores of the examples by the prior, `(*batch, n, k)`; zero without one."""
        return torch.zeros_like(self.targets) if self.prior is None else self.features @ self.prior.mT

    @property
    def labeled_targets(self) -> Float[Tensor, "*batch n k"]:
        """One-hot labels `(*batch, n, k)` with masked examples in class 0, for heads that need all labels."""
        if self.mask is None:
            return self.targets
        return torch.cat([self.targets[..., :1] + ~self.mask.unsqueeze(-1), self.targets[..., 1:]], -1)

    def __repr__(self) -> str:
        shapes = f"features={tuple(self.features.shape)}, targets={tuple(self.targets.shape)}"
        return f"SupportSet({shapes}{'' if self.mask is None else ', masked'})"


@dataclass(frozen=True, eq=False, repr=False)
class KernelExpansion(TensorRecord):
    """The result of `Head.solve`: scores as a combination of kernel values.

    With `s = kernel(q, support)`, the score of a query q for class c is
    `s @ coef_c + s @ quadratic_c @ s + bias_c + self_similarity_weight * kernel(q, q)`. With a linear kernel, `weight`
    can replace the first two terms by `q @ weight_c + q @ quadratic_c @ q`.

    Attributes:
        coef: dual coefficients, `(*batch, n, k)`; those of masked examples are ignored.
        weight: primal weights for a linear kernel, `(*batch, k, d)`; None (default) to compute scores from `coef`.
        bias: `(*batch, k)`; None (default) for zero.
        quadratic: symmetric, `(*batch, k, n, n)`, or `(*batch, k, d, d)` if there is a `weight`; None (default) for a
            score that is linear in the kernel.
        self_similarity_weight: factor of each query's kernel with itself, for all classes, such as -1 for squared
            distances; a number or a 0-d tensor. Defaults to 0.
        solution: status, gap and multipliers, or a function that computes them when somebody looks at them; None
            (default) for `CvxpyHead` and heads of your own.
    """

    coef: Float[Tensor, "*batch n k"]
    weight: Float[Tensor, "*batch k d"] | None = None
    bias: Float[Tensor, "*batch k"] | None = None
    quadratic: Float[Tensor, "*batch k m m"] | None = None
    self_similarity_weight: float | Float[Tensor, ""] = 0.0
    solution: Solution | Callable[[], Solution] | None = None

    @property
    def certificate(self) -> Solution | None:
        """The solution, computed if that was not done before."""
        solution = self.solution
        return solution if solution is None or isinstance(solution, Solution) else solution()

    def certified(self: _E) -> _E:
        """A copy whose solution is computed."""
        return replace(self, solution=self.certificate)


def is_readable(value: Tensor) -> bool:
    """Whether compiled code can read a tensor as it lies in memory, and nobody else has to see that."""
    if is_recorded():  # before anything that compilers cannot trace
        return False
    is_plain = value.is_cpu and value.is_contiguous() and not value.is_neg()
    return is_plain and value.dtype in (torch.float32, torch.float64) and numba_is_installed()


def _is_for_compiled_code(features: Float[Tensor, "*batch n d"]) -> bool:
    """Whether compiled code should compute the products of the examples of each task."""
    has_gradient = features.requires_grad and torch.is_grad_enabled()
    if has_gradient or features.dtype != torch.float64 or not is_readable(features):
        return False
    n = features.shape[-2]
    return n * features.numel() >= _MIN_OPERATIONS_TO_COMPILE and n <= _MAX_EXAMPLES_TO_COMPILE


def _compiled_product(features: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n n"]:
    from convexheads.heads.base._gram_numba import gram_of

    return gram_of(features)


def _mask_gram(gram: Tensor, mask: Tensor) -> Tensor:
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    squared = gram.detach().diagonal(dim1=-2, dim2=-1)
    mean = (squared * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return gram.masked_fill(~both, 0) + torch.diag_embed(mean * ~mask)


def merge_groups(groups: Sequence[KernelExpansion], ways: Integer[Tensor, "*batch"]) -> KernelExpansion:
    """Merge `groups`, one per number of classes that occurs in `ways`, in ascending order, padded with zeros."""
    order = ways.flatten().argsort(stable=True).argsort()
    class_dims = {"coef": 1, "weight": 2, "bias": 1, "quadratic": 3, "bound_multipliers": 1}  # counted from the last
    groups = [group.certified() for group in groups]
    records = [group.tensors() for group in groups]

    def merge(name: str, first: Tensor) -> Any:
        if name == "self_similarity_weight":
            return first
        if any(name not in record for record in records):  # such as iterations that not every solver reports
            return None
        values = [record[name] for record in records]
        if class_dim := class_dims.get(name.removeprefix("solution.")):
            counts = [value.shape[-class_dim] for value in values]
            padding = [(0, 0) * (class_dim - 1) + (0, max(counts) - k) for k in counts]
            values = [functional.pad(value, sizes) for value, sizes in zip(values, padding, strict=True)]
        joined = torch.cat(values)[order]
        return joined.reshape((*ways.shape, *joined.shape[1:]))

    return groups[0].map(merge)
