"""What a kernel is, and how kernels are added and multiplied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convexheads._gram import constant
from convexheads._validation import Check, check_finite, describe_shape, describe_type, is_dense
from convexheads.errors import ConvexHeadsError, InputError
from convexheads.hyperparameters import Configurable, Hyperparameter, Learnable, as_tensor, check_positive

KernelLike = Callable[[Tensor, Tensor], Tensor]
"""The type of kernels, which map `(*batch, m, d)` and `(*batch, n, d)` to the Gram matrix `(*batch, m, n)`."""


def is_kernel(value: object) -> TypeGuard[KernelLike]:
    """Whether the `value` can be called, and is not a class, a `Learnable` or a head."""
    return callable(value) and not (isinstance(value, type | Learnable) or hasattr(value, "fit"))


def check_kernel(name: str, value: Any) -> KernelLike:
    """Return the `value` of the argument `name` if it is a kernel, or raise `InputError`."""
    if not is_kernel(value):
        raise InputError(name, "a callable (x, y) -> gram, such as convexheads.kernels.RBF(1.0)", repr(value))
    method = getattr(value, "condition_on", None)
    if method is not None and not callable(method):
        raise InputError(name, "a method condition_on(features, mask), or none", repr(method))
    return value


def condition(
    kernel: KernelLike, features: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None
) -> KernelLike:
    """Fix the data-dependent and learnable parameters of a `kernel` for one support set.

    Its method `condition_on(features, mask)` is called; without it, the kernel stays unchanged. The `features` are
    `(*batch, n, d)`, and the `mask` is `(*batch, n)`, False at examples to ignore, or None.
    """
    condition_on = getattr(kernel, "condition_on", None)
    return kernel if condition_on is None else condition_on(features, mask)


def compute_gram(kernel: KernelLike, x: Tensor, y: Tensor, *, validate: bool) -> Float[Tensor, "*batch m n"]:
    """The Gram matrix `(*batch, m, n)` of a `kernel` for `x` and `y`, which are `(*batch, m, d)` and `(*batch, n, d)`.

    It raises `InputError` for another shape or dtype or, with `validate`, for a value that is not finite.
    """
    try:
        gram: Any = kernel(x, y)
    except RuntimeError as error:  # how PyTorch refuses to mix dtypes
        _explain_dtype(kernel, x.dtype, error)
        raise
    expected = (*x.shape[:-1], y.shape[-2])
    if not isinstance(gram, Tensor) or gram.shape != expected:
        raise InputError("kernel", f"a Gram matrix of shape {expected}", describe_shape(gram))
    if not is_dense(gram):
        raise InputError("kernel", "a dense Gram matrix", describe_type(gram))
    if gram.device != x.device:
        raise InputError("kernel", f"the device of its arguments, {x.device}", f"a result on {gram.device}")
    if gram.dtype != x.dtype:
        raise InputError("kernel", f"the dtype of its arguments, {x.dtype}", f"a result of {gram.dtype}")
    if validate:
        check_finite("kernel", gram)
    return gram


def _explain_dtype(kernel: KernelLike, dtype: torch.dtype, error: RuntimeError) -> None:
    """Raise `InputError` if a kernel failed that is a module of another dtype."""
    parameters = kernel.parameters() if isinstance(kernel, nn.Module) else ()
    others = {parameter.dtype for parameter in parameters if parameter.is_floating_point()} - {dtype}
    if others and not isinstance(error, ConvexHeadsError):
        remedy = "call `head.double()`, or convert the arguments in the kernel's `forward`"
        raise InputError("kernel", f"parameters of {dtype}", f"{others.pop()}; {remedy}") from error


class Kernel(Configurable):
    """Base class of kernels, which can be added to and multiplied by kernels, positive numbers and `Learnable`s.

    Sums and products of kernels are kernels, and so is a positive constant (Rasmussen & Williams 2006, Section 4.2.4
    and Table 4.1). A subclass implements `forward(x, y)`, or `condition_on` if its parameters depend on the data.

    Raises:
        InputError: an argument is unusable. `+` and `*` raise it for a value that is neither a kernel nor a positive
            finite number or `Learnable`.
    """

    def __add__(self, other: KernelLike | Hyperparameter) -> Sum:
        return Sum(self, _as_kernel(other))

    def __radd__(self, other: KernelLike | Hyperparameter) -> Sum:
        return Sum(self) if type(other) is int and other == 0 else Sum(_as_kernel(other), self)  # 0 is how `sum` starts

    def __mul__(self, other: KernelLike | Hyperparameter) -> Product:
        return Product(self, _as_kernel(other))

    def __rmul__(self, other: KernelLike | Hyperparameter) -> Product:
        return Product(_as_kernel(other), self)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x` and `y`; by default that of the kernel conditioned on `y`."""
        conditioned = self.condition_on(y, None)
        if conditioned is self:
            raise NotImplementedError(f"{type(self).__name__} has neither `forward` nor `condition_on`")
        return conditioned(x, y)

    def condition_on(self, features: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> KernelLike:
        """The kernel for the support set with these `features` and `mask`; by default the kernel itself.

        It must be deterministic, because tasks with different numbers of classes are conditioned again in groups.
        If it has parameters per task, these have the shape `(*batch, 1, 1)`. Return a module or a `functools.partial`,
        not a closure: what copies a fitted head (`to`, `detach` and `fitted[0]`) cannot
        reach the tensors that a closure captures.
        """
        return self


def _as_kernel(value: Any) -> KernelLike:
    return value if is_kernel(value) else Constant(value)


class Constant(Kernel):
    r"""The same number for every pair, \(k(x, y) = c\).

    Use it when an SVM or a logistic regression should have a bias per class: `Linear() + 1.0`. Such a bias is
    regularized like the weights. See Rasmussen & Williams (2006), Table 4.1.

    Args:
        value: c, positive; a float or `Learnable`. Defaults to 1.

    Example:
        `SVMHead(kernel=Linear() + Constant(2.0))`
    """

    checks: ClassVar[dict[str, Check]] = {"value": check_positive}

    def __init__(self, value: Hyperparameter = 1.0) -> None:
        super().__init__()
        self.value = value

    def condition_on(self, features: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> KernelLike:
        return partial(constant, value=as_tensor(self.value, features))


class _CompositeKernel(Kernel):
    def __init__(self, *kernels: KernelLike) -> None:
        super().__init__()
        if not kernels:
            raise InputError("kernels", "at least one kernel", "none")
        for number, kernel in enumerate(kernels):
            check_kernel("kernels", kernel)
            if isinstance(kernel, nn.Module):
                self.add_module(str(number), kernel)
        self.kernels = kernels

    def condition_on(self, features: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> KernelLike:
        return type(self)(*(condition(kernel, features, mask) for kernel in self.kernels))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {}

    def _grams(self, x: Tensor, y: Tensor) -> Float[Tensor, "kernels *batch m n"]:
        return torch.stack([compute_gram(kernel, x, y, validate=False) for kernel in self.kernels])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.kernels))})"


class Sum(_CompositeKernel):
    r"""The sum of kernels, \(k_1 + k_2 + \dots\), whose feature map concatenates theirs.

    Use it to combine several notions of similarity. Also written `first + second`. See Rasmussen &
    Williams (2006), Section 4.2.4.

    Args:
        kernels: one or more callables `(x, y) -> gram`.

    Example:
        `Linear() + 0.5 * RBF()`
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return self._grams(x, y).sum(0)


class Product(_CompositeKernel):
    r"""The product of kernels, \(k_1 k_2 \cdots\), whose features are the products of theirs.

    Use it when examples should be similar only if all kernel values are large, or to weight a kernel. Also written
    `first * second` or `0.5 * kernel`. The argument `kernels` is that of `Sum`. See Rasmussen &
    Williams (2006), Section 4.2.4.

    Example:
        `Learnable(0.5) * RBF()`
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return self._grams(x, y).prod(0)
