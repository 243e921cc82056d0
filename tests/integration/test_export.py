"""What is exported runs elsewhere, and gives what the head gives."""

from __future__ import annotations

import pytest
import torch
from tasks import close, task

import convexheads as ch
from convexheads.kernels import RBF, Cosine, Linear, Polynomial, UnitScale

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CLOSED_FORMS = {
    "ridge": lambda: ch.RidgeHead(0.5, scale=ch.Learnable(2.0), validate=False),
    "prototypes": lambda: ch.PrototypeHead(kernel=RBF(), validate=False),
    "discriminant": lambda: ch.LinearDiscriminantHead(validate=False),
    "mahalanobis": lambda: ch.MahalanobisHead(validate=False),
}
FITTED = {
    "svm": lambda: ch.SVMHead(kernel=RBF()),
    "ridge": lambda: ch.RidgeHead(0.5, kernel=UnitScale(RBF()) + ch.Learnable(0.5) * Linear()),
    "logistic": lambda: ch.LogisticHead(kernel=Polynomial(2) * Cosine()),
    "mahalanobis": lambda: ch.MahalanobisHead(),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_closed_form_adapts_after_export(name):
    support, labels, query, ways = task(2, shots=(2, 3, 2))
    head = CLOSED_FORMS[name]()
    program = torch.export.export(head, (support, labels, query), {"ways": ways}).module()
    others = task(2, shots=(3, 2, 2), seed=1)[:3]
    assert not torch.equal(others[1], labels)
    assert close(program(*others, ways=ways), head(*others, ways=ways)) < 1e-12


def test_an_svm_is_exported_after_the_fit():
    support, labels, query, ways = task()
    with pytest.raises(ch.ConvexHeadsError, match=r"torch\.export: expected a head with a closed form"):
        torch.export.export(ch.SVMHead(validate=False), (support, labels, query), {"ways": ways})


def test_a_regressor_adapts_after_export():
    support, labels, query, _ = task(2)
    head = ch.GaussianProcessHead(validate=False)
    program = torch.export.export(head, (support, labels.double(), query)).module()
    assert close(program(2 * support, -labels.double(), query), head(2 * support, -labels.double(), query)) < 1e-12


def test_what_reads_values_is_refused():
    support, labels, query, ways = task()
    for head, known in (
        (ch.RidgeHead(), {"ways": ways}),
        (ch.RidgeHead(validate=False), {}),
        (ch.SVMHead(solver=ch.solvers.InteriorPointSolver(gradient="relaxed"), validate=False), {"ways": ways}),
    ):
        with pytest.raises(ch.ConvexHeadsError, match=r"torch\.export: expected validate=False"):
            torch.export.export(head, (support, labels, query), known)


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_head_is_a_program(name, tmp_path):
    support, labels, query, _ = task(2, shots=(2, 3, 2))
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 1] = False
    fitted = FITTED[name]().fit(support.requires_grad_(), labels, mask=mask)
    shapes = {"query": {1: torch.export.Dim("queries", min=2)}}
    torch.export.save(torch.export.export(fitted.to_module(), (query,), dynamic_shapes=shapes), tmp_path / "head.pt2")
    program = torch.export.load(tmp_path / "head.pt2").module()
    more = torch.randn(2, 9, query.shape[-1], dtype=query.dtype)
    assert close(program(more), fitted(more)) < 1e-12
    assert not program(more).requires_grad


def test_a_module_of_a_fitted_head_is_cast_and_checks_nothing():
    support, labels, query, _ = task()
    fitted = ch.SVMHead(kernel=RBF()).fit(support, labels)
    module = fitted.to_module()
    assert module(query.masked_fill(query > 0, torch.nan)).isnan().any()
    assert close(module.float()(query), fitted(query)) < 1e-5
    assert all(value.dtype != torch.float64 for value in (module.fitted.support.features, module.fitted.expansion.coef))
    with pytest.raises(ch.InputError, match="finite"):
        fitted(query.masked_fill(query > 0, torch.nan))


def test_a_linear_layer_is_a_program():
    support, labels, query, _ = task(dtype=torch.float32)
    fitted = ch.SVMHead(0.3, kernel=Linear() + 1.0).fit(support, labels)
    program = torch.export.export(fitted.to_linear(), (query,)).module()
    assert close(program(3 * query), fitted(3 * query)) < 1e-5


@pytest.mark.parametrize("name", ["linear", *FITTED])
def test_a_fitted_head_in_onnx(name, tmp_path):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    support, labels, query, _ = task(dtype=torch.float32)
    fitted = ch.SVMHead(0.3).fit(support, labels) if name == "linear" else FITTED[name]().fit(support, labels)
    module = fitted.to_linear().eval() if name == "linear" else fitted.to_module()
    torch.onnx.export(module, (query,), tmp_path / "head.onnx", dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(str(tmp_path / "head.onnx"))
    (found,) = session.run(None, {session.input_names[0]: (3 * query).numpy()})
    assert close(torch.from_numpy(found), fitted(3 * query)) < 1e-5
