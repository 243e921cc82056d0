"""The benchmark of honesty: its tasks are those of their seeds, its judges judge, and a bad answer gets its verdict."""

from __future__ import annotations

import os
import time
from unittest.mock import patch

import mpmath
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import SVR

import convexheads as ch
from benchmarks.honesty import __main__ as command
from benchmarks.honesty import attempts as honesty
from benchmarks.honesty import contenders, judges
from benchmarks.honesty.contenders import Answer, Contender
from benchmarks.honesty.tasks import hard_task
from convexheads.solvers.native import active_set


def test_tasks_are_functions_of_their_seed_and_cover_the_ranges():
    tasks = [hard_task(seed) for seed in range(300)]
    again = hard_task(17)
    assert torch.equal(again.support, tasks[17].support)
    assert again.C == tasks[17].C
    assert {task.support.dtype for task in tasks} == {torch.float64, torch.float32, torch.bfloat16}
    assert {task.ways for task in tasks} >= {1, 2, 3, 5}
    assert max(task.ways for task in tasks) > 40
    assert max(task.support.shape[1] for task in tasks) > 1500
    assert min(task.support.shape[1] for task in tasks) == 1
    kinds = {kind for task in tasks for kind in task.kinds}
    assert {"collinear", "ill-conditioned", "duplicates", "near-ties", "zeros", "label noise", "one class"} <= kinds
    scales = [task.support.double().abs().max().item() for task in tasks if "all zero" not in task.kinds]
    assert min(scales) < 1e-4
    assert max(scales) > 1e5
    other = [hard_task(seed, "other") for seed in range(300)]
    kinds = {kind for task in other for kind in task.kinds}
    assert kinds >= {
        "counts",
        "integers",
        "binary",
        "heavy tails",
        "clusters",
        "spectrum",
        "near duplicates",
        "row scales",
    }
    assert all(task.support.isfinite().all() and 1 <= task.ways <= 20 for task in other)
    beyond = [hard_task(seed, "beyond") for seed in range(20)]
    length = [task.support.double().square().sum(-1).mean().item() for task in beyond]
    assert all(task.C * square > 9e7 or square == 0 for task, square in zip(beyond, length, strict=True))


@pytest.fixture
def simple():
    generator = np.random.default_rng(0)
    return generator.normal(size=(12, 5)), np.arange(12) % 3


def test_judges_agree_with_solvers_that_others_wrote(simple):
    """An optimum of scikit-learn has no gap; a point next to it has."""
    x, labels = simple
    values = x[:, 0] + 0.1 * x[:, 1] ** 2
    other = SVR(kernel="linear", C=0.7, epsilon=0.1, tol=1e-12).fit(x, values)
    coef = np.zeros((12, 1))
    coef[other.support_, 0] = other.dual_coef_[0]
    centered = values - other.intercept_  # the library has no intercept
    assert judges.support_vector_regression(x, centered, 0.7, 0.1, coef) < 1e-6
    assert judges.support_vector_regression(x, centered, 0.7, 0.1, 0.9 * coef) > 1e-4

    targets = np.eye(3)[labels]
    weights = Ridge(alpha=2.0, fit_intercept=False, solver="cholesky").fit(x, targets).coef_.T
    coef = (targets - x @ weights) / 2.0
    assert judges.ridge(x, targets, 2.0, coef) < 1e-12
    assert judges.ridge(x, targets, 2.0, 1.01 * coef) > 1e-6

    settings = {"C": 0.5, "fit_intercept": False, "tol": 1e-12, "max_iter": 10_000}
    shares = LogisticRegression(**settings).fit(x, labels).predict_proba(x)
    assert judges.logistic(x, labels, 3, 2.0, (targets - shares) / 2.0) < 1e-9
    assert judges.logistic(x, labels, 3, 2.0, 0.9 * (targets - shares) / 2.0) > 1e-4


def test_the_judge_of_logistic_regression_keeps_digits_where_labels_are_nearly_certain(simple):
    """One minus the probability of a label is around 1e-13 here, and the gap is compared with one of 50 digits."""
    x, labels = simple
    x, penalty = x + 5 * np.eye(5)[labels], 1e-14
    fitted = ch.LogisticHead(penalty, on_failure="return").fit(torch.tensor(x), torch.tensor(labels))
    weights, coef = fitted.weight.numpy().T, fitted.expansion.coef.numpy()
    with mpmath.workdps(50):
        rows, w, weight = mpmath.matrix(x.tolist()), mpmath.matrix(weights.tolist()), mpmath.mpf(penalty)
        scores, slopes = rows * w, mpmath.matrix(12, 3)
        primal, dual = weight * sum(value**2 for value in w) / 2, mpmath.mpf(0)
        for i, label in enumerate(labels.tolist()):
            exponentials = [mpmath.exp(scores[i, c]) for c in range(3)]
            shares = [value / sum(exponentials) for value in exponentials]
            primal -= mpmath.log(shares[label])
            dual -= sum(share * mpmath.log(share) for share in shares)
            for c in range(3):
                slopes[i, c] = (c == label) - shares[c]
        dual -= sum(value**2 for value in rows.T * slopes) / (2 * weight)
        gap = float((primal - dual) / primal)
    assert 1e-12 < gap < 1e-3
    assert judges.logistic(x, labels, 3, penalty, coef, weights) == pytest.approx(gap, rel=1e-2)


@pytest.mark.parametrize(
    ("head", "judge"),
    [
        (ch.SVMHead, judges.crammer_singer),
        (ch.WestonWatkinsSVMHead, judges.weston_watkins),
        (ch.OneVsRestSVMHead, judges.one_vs_rest),
        (ch.SimplifiedSVMHead, judges.simplified),
    ],
    ids=lambda value: value.__name__,
)
def test_judges_of_svms_find_the_gap_of_a_wrong_answer(head, judge, simple):
    x, labels = simple
    coef = head(0.3).fit(torch.from_numpy(x), torch.from_numpy(labels)).expansion.coef.numpy()
    assert judge(x, labels, 3, 0.3, coef) < 1e-12
    for wrong in (0.9 * coef, 0 * coef, -coef, coef[::-1]):
        assert judge(x, labels, 3, 0.3, wrong) > 1e-3
    assert judge(x, labels, 3, 0.3, np.full_like(coef, np.nan)) == np.inf


@pytest.mark.parametrize("name", ["SVM", "logistic regression", "ridge regression", "prototypes", "Mahalanobis"])
def test_native_heads_solve_hard_tasks(name):
    for seed in range(20):
        task = hard_task(seed)
        if task.size < 1500:
            verdict, detail, gradient_error = honesty.attempt(name, "hard", seed)
            assert verdict in ("solved", "left out"), (seed, detail)
            assert gradient_error is None or gradient_error < honesty.WRONG_GRADIENT, seed


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, each in contenders.contenders().items() if not each.peer])
def test_native_heads_solve_hard_tasks_on_cuda(name, cuda):
    for seed in range(30):
        if hard_task(seed).size < 3000:
            verdict, detail, gradient_error = honesty.attempt(name, "hard", seed, device=cuda.type)
            assert verdict in ("solved", "left out"), (seed, detail)
            assert gradient_error is None or gradient_error < honesty.WRONG_GRADIENT, seed


@pytest.mark.parametrize("seed", [79, 948, 1456])
def test_interior_point_is_patient_where_the_gap_falls_slowly(seed):
    """Tasks at which it once gave up, at 2e-6."""
    assert honesty.attempt("SVM, in torch", "hard", seed)[0] == "solved"


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *(("SVM", seed) for seed in (68, 339)),
        *(("SVM, in torch", seed) for seed in (68, 339)),
        *(("Weston-Watkins SVM", seed) for seed in (92, 187, 299)),
        *(("one-vs-rest SVM", 68), ("simplified SVM", 339), ("support vector regression", 309)),
    ],
)
def test_what_rounding_spoils_is_flagged(name, seed):
    """With C so large that rounding the Gram matrix moves the optimum, a gap of the rounded problem proves nothing."""
    verdict, detail, _ = honesty.attempt(name, "beyond", seed)
    assert verdict == "flagged"
    assert float(detail.split("relative gap ")[1].split(",")[0]) > honesty.PRECISE


@pytest.mark.parametrize("backend", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_hard_margin_is_no_matter_of_rounding(backend):
    """Where weights separate the support, C may be as large as it likes; and another task's rounding changes nothing."""
    for seed in (9, 11, 34, 46, 53):
        task = hard_task(seed, "beyond")
        head = ch.SVMHead(task.C, solver=ch.solvers.NativeSolver(on_failure="return", backend=backend))
        noise = torch.from_numpy(np.random.default_rng(seed).permutation(task.labels.numpy()))
        few = task.support[:, :1].expand_as(task.support) / task.support.shape[1] ** 0.5  # no weights separate these
        support, labels = torch.stack([task.support, few]), torch.stack([task.labels, noise])
        fitted = head.fit(support, labels, ways=task.ways)
        assert fitted.solution.converged.tolist() == [True, False]
        coef = fitted.expansion.coef[0].numpy()
        support = task.support.double().numpy()
        assert judges.crammer_singer(support, task.labels.numpy(), task.ways, task.C, coef) < honesty.PRECISE


def test_verdicts():
    assert honesty.verdict(Answer(1e-9, solved=True)) == "solved"
    assert honesty.verdict(Answer(1e-5, solved=True)) == "imprecise"
    assert honesty.verdict(Answer(1e-3, solved=True)) == "silently wrong"
    assert honesty.verdict(Answer(float("nan"), solved=True)) == "silently wrong"
    assert honesty.verdict(Answer(1e-3, solved=False)) == "flagged"


def _hang(task):
    time.sleep(60)


def _die(task):
    os._exit(3)


def _raise(task):
    raise ZeroDivisionError


def _flag(task):
    raise ch.SolverError("no")


def test_crashes_and_hangs_are_counted(monkeypatch):
    tried = {"hangs": _hang, "dies": _die, "raises": _raise, "flags": _flag}
    monkeypatch.setattr(honesty, "contenders", lambda: {name: Contender(answer) for name, answer in tried.items()})
    found = {name: next(honesty.attempts(name, "hard", range(1), limit=2, workers=1))[0] for name in tried}
    assert found == {"hangs": "hung", "dies": "crashed", "raises": "crashed", "flags": "flagged"}


def test_gradients_are_judged():
    head = ch.SVMHead(0.3)
    support, labels = torch.randn(9, 12, dtype=torch.float64), torch.arange(9) % 3
    query = torch.randn(4, 12, dtype=torch.float64)
    assert contenders._gradient_error(lambda x: head(x, labels, query), support) < 1e-5
    assert contenders._gradient_error(lambda x: head(x, labels, query) + 0.1 * (x - x.detach()).sum(), support) > 0.01


def test_command(tmp_path, monkeypatch, capsys):
    options = ["--tasks", "3", "--other", "2", "--beyond", "2", "--peer-tasks", "2", "--workers", "1"]
    names = ["SVM", "SVM on qpth alone"]
    monkeypatch.setattr("sys.argv", ["honesty", *options, "--names", str(names), "--output", str(tmp_path)])
    command.main()
    assert "silently wrong" in (tmp_path / "honesty.md").read_text()
    assert (tmp_path / "notable.csv").read_text().startswith("contender,set,seed,verdict,detail")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["honesty", "--names", "[nobody]"])
    with pytest.raises(SystemExit, match=r"names: expected .*, got nobody"):
        command.main()


@pytest.mark.parametrize("seed", [2, 12, 39])
def test_what_the_compiled_search_left_is_not_searched_again(seed):
    """In torch, a search of many classes takes seconds, and ends as the compiled one did."""
    hard = hard_task(seed)
    head = ch.SVMHead(hard.C)
    rounds = []

    def search(*arguments, max_rounds, **options):
        rounds.append(max_rounds)
        return original(*arguments, max_rounds=max_rounds, **options)

    original = active_set.search
    with patch.object(active_set, "search", search):
        fitted = head.fit(hard.support, hard.labels, ways=hard.ways)
    assert fitted.solution.converged
    assert rounds == [1]  # of the polishing
