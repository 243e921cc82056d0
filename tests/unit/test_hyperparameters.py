"""Hyperparameters: numbers and `Learnable`s, checked where they are assigned, and read and set as in scikit-learn."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tasks import task
from torch import nn

from convexheads import (
    ClassificationHead,
    GaussianProcessHead,
    InputError,
    KernelExpansion,
    Learnable,
    LinearDiscriminantHead,
    LogisticHead,
    RidgeHead,
    SVMHead,
    kernels,
    parameter_groups,
)
from convexheads.kernels import RBF, Constant, Cosine, Linear, Polynomial
from convexheads.solvers import NativeSolver, QpthSolver

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize(
    ("make", "name", "value", "good"),
    [
        (SVMHead, "C", -5, 2),
        (SVMHead, "scale", 0, Learnable(3.0)),
        (SVMHead, "solver", "cplex", NativeSolver(tolerance=1e-4)),
        (SVMHead, "kernel", "rbf", RBF()),
        (SVMHead, "squared_hinge", 1, True),
        (SVMHead, "validate", 0, False),
        (LogisticHead, "steps", 0, 5),
        (LogisticHead, "on_failure", "ignore", "return"),
        (LinearDiscriminantHead, "shrinkage", 2, 0.3),
        (LinearDiscriminantHead, "variance", -1, None),
        (RBF, "length_scale", -1.0, 3.0),
        (Polynomial, "degree", 1.5, 3),
        (Constant, "value", 0.0, Learnable(2.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_an_assignment_is_checked_as_the_constructor_checks(make, name, value, good):
    with pytest.raises(InputError) as constructed:
        make(**{name: value})
    module = make()
    before = repr(module)
    with pytest.raises(InputError) as assigned:
        setattr(module, name, value)
    assert str(assigned.value) == str(constructed.value)
    with pytest.raises(InputError):
        module.set_params(**{name: value})
    assert repr(module) == before
    setattr(module, name, good)
    assert repr(module) == repr(make(**{name: good}))


def test_a_number_takes_the_place_of_a_learnable_and_back():
    head = SVMHead(C=Learnable(0.5), scale=2.0)
    head.C = 0.25
    head.scale = Learnable(3.0)
    assert head.C == 0.25
    assert [name for name, _ in head.named_parameters()] == ["scale.raw_value"]
    data = task()
    torch.testing.assert_close(head(*data[:3]), SVMHead(C=0.25, scale=3.0)(*data[:3]))


def test_parameters_are_those_of_scikit_learn():
    head = SVMHead(C=0.3, kernel=Polynomial(3))
    assert head.get_params(deep=False).keys() == {
        *("C", "squared_hinge", "smoothing", "solver", "class_weight", "intercept", "kernel", "scale", "validate")
    }
    params = head.get_params()
    assert params["kernel__degree"] == 3
    assert params["kernel"] is head.kernel
    assert repr(head.set_params(kernel__length_scale=2.0, kernel=RBF()).kernel) == "RBF(length_scale=2.0)"
    head.set_params(kernel=Polynomial())
    assert head.set_params(C=0.5, kernel__degree=2) is head
    assert (head.C, head.kernel.degree) == (0.5, 2)
    assert repr(SVMHead(**head.get_params(deep=False))) == repr(head)
    for name in ("D", "C__value", "kernel__length_scale"):
        with pytest.raises(InputError):
            head.set_params(**{name: 1.0})


def test_none_is_the_default_kernel():
    for head in (SVMHead(kernel=RBF()), GaussianProcessHead(kernel=Linear())):
        assert repr(head.set_params(kernel=None)) == repr(type(head)())


@pytest.mark.parametrize("kernel", [Cosine(), Linear() + RBF()], ids=repr)
def test_a_kernel_without_settings_says_so(kernel):
    with pytest.raises(InputError, match=rf"set_params: expected .* {type(kernel).__name__} \(none\), got 'x'"):
        kernel.set_params(x=1)


def test_a_head_that_passes_its_options_on_has_their_parameters():
    class OwnHead(ClassificationHead):
        def __init__(self, weight=1.0, **options):
            super().__init__(**options)
            self.weight = weight

        def solve(self, support):
            return KernelExpansion(self.weight * support.targets)

    head = OwnHead(2.0, scale=3.0)
    assert list(head.get_params(deep=False)) == ["weight", "kernel", "scale", "validate"]
    assert repr(head) == "OwnHead(weight=2.0, scale=3.0)"
    assert repr(OwnHead()) == "OwnHead(weight=1.0)"


def test_a_head_that_renames_an_argument_is_shown():
    class Renamed(RidgeHead):
        def __init__(self, lam):
            super().__init__(lam, scale=2.0)

    assert repr(Renamed(3.0)) == "Renamed()"
    with pytest.raises(AttributeError, match="lam"):
        Renamed(3.0).get_params()


def test_repr_shows_what_is_not_the_default_of_that_class():
    """Each once printed as another model: the default kernel of a Gaussian process is not linear."""

    class NativeSolver(QpthSolver):
        def __repr__(self):
            return "NativeSolver()"

    class Scaled(Linear):
        def forward(self, x, y):
            return 2 * x @ y.mT

    linear = GaussianProcessHead(kernel=Linear())
    assert isinstance(eval(repr(linear), vars(kernels) | {"GaussianProcessHead": GaussianProcessHead}).kernel, Linear)
    assert "kernel" not in repr(GaussianProcessHead(kernel=RBF()))
    assert "kernel" not in repr(SVMHead(kernel=Linear()))
    assert "kernel=Scaled()" in repr(SVMHead(kernel=Scaled()))
    assert "solver" in repr(SVMHead(solver=NativeSolver()))
    assert "solver" not in repr(SVMHead())


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda head: head.to(torch.float16)])
def test_learnables_keep_their_digits_in_a_model_of_few(cast):
    model = nn.Sequential(nn.Linear(3, 2), SVMHead(C=Learnable(0.1234567)))
    model = cast(model)
    assert next(model[0].parameters()).dtype.itemsize == 2
    assert model[1].C.value.item() == pytest.approx(0.1234567, rel=1e-6)
    assert model[1].C.value.dtype == torch.float32
    assert model.double()[1].C.value.dtype == torch.float64
    assert model.to("meta")[1].C.value.is_meta


def test_learnables_are_saved_under_one_name():
    head = RidgeHead(Learnable(0.5))
    assert list(head.state_dict()) == ["regularization.raw_value"]
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = RidgeHead(Learnable(7.0))
    other.load_state_dict(torch.load(file))
    assert repr(other) == repr(head)
    other.load_state_dict({"regularization.log_value": head.regularization.raw_value})
    assert repr(copy.deepcopy(other)) == repr(head)


def test_weight_decay_leaves_learnables_alone():
    model = nn.Sequential(nn.Linear(3, 2), SVMHead(C=Learnable(0.1), kernel=RBF(Learnable(2.0))))
    groups = parameter_groups(model, weight_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(groups, lr=0.1)
    weight, before = model[0].weight.detach().clone(), repr(model[1])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert repr(model[1]) == before
    torch.testing.assert_close(model[0].weight, 0.95 * weight)
    with pytest.raises(InputError, match="weight_decay"):
        parameter_groups(model, weight_decay=-1)
