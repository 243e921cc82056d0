"""Labels that a head takes: classes without examples, labels of one task for all, and what is no tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import clusters, examples, task
from torch.utils._python_dispatch import TorchDispatchMode

from convexheads import (
    EpisodeLoader,
    GaussianProcessHead,
    InputError,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SVMHead,
    WestonWatkinsSVMHead,
    calibrate,
    evaluate,
    split_task,
)

pytestmark = pytest.mark.usefixtures("unchecked")

TOLERANT = [
    SVMHead(),
    WestonWatkinsSVMHead(),
    OneVsRestSVMHead(),
    SimplifiedSVMHead(),
    LogisticHead(),
    RidgeHead(),
]
NEEDING = [PrototypeHead(), LinearDiscriminantHead(variance=1.0), MahalanobisHead()]


def name(head: object) -> str:
    return type(head).__name__


tolerant = pytest.mark.parametrize("head", TOLERANT, ids=name)
needing = pytest.mark.parametrize("head", NEEDING, ids=name)
all_heads = pytest.mark.parametrize("head", TOLERANT + NEEDING, ids=name)


# Classes without examples ---------------------------------------------------------------------------------------------


@all_heads
@pytest.mark.parametrize("options", [{}, {"ways": 5}, {"ways": torch.tensor([5, 5])}, {"ways": [5, 5]}], ids=str)
def test_a_gap_in_the_labels_is_an_error(head, options):
    support, labels, query, _ = task(2)
    labels[0], labels[1] = torch.arange(6) % 5, torch.tensor([4, 0, 1, 3, 3, 1])
    with pytest.raises(InputError, match=r"got no example of class 2 in task \(1,\)") as caught:
        head(support, labels, query, **options)
    assert caught.value.argument == "labels"
    assert "labels.unique(return_inverse=True)" in str(caught.value)


@tolerant
def test_more_ways_than_the_labels_show(head):
    support, labels, query, _ = task(2)
    with pytest.raises(InputError, match=r"no example of class 3 in task \(0,\).*allow_missing_classes=True"):
        head(support, labels, query, ways=4)
    logits = head(support, labels, query, ways=4, allow_missing_classes=True)
    assert logits.shape[-1] == 4
    assert logits.isfinite().all()
    for ways in (torch.tensor([4, 4]), [4, 4], (4, 4), np.array([4, 4]), torch.tensor(4)):
        torch.testing.assert_close(head(support, labels, query, ways=ways), logits)


@needing
def test_heads_that_need_every_class_cannot_be_asked_for_less(head):
    support, labels, query, ways = task(2)
    for options in ({"ways": 4}, {"ways": torch.tensor([3, 4])}, {"mask": labels != 1}):
        for allow in (False, True):
            with pytest.raises(InputError, match=f"which {name(head)} needs, got no example of class") as caught:
                head(support, labels, query, **options, allow_missing_classes=allow)
            assert "allow_missing_classes" not in str(caught.value)
    expected = head(support, labels, query, ways=ways)
    assert torch.equal(head(support, labels, query, allow_missing_classes=True), expected)


@tolerant
def test_a_class_that_is_masked_out_is_missing(head):
    support, labels, query, _ = task(2)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1] = labels[1] != 1
    with pytest.raises(InputError, match=r"no example of class 1 in task \(1,\)"):
        head(support, labels, query, mask=mask)
    assert head(support, labels, query, mask=mask, allow_missing_classes=True).isfinite().all()
    labels[~mask] = -100  # of padding, which counts for no class
    mask[1] = True
    with pytest.raises(InputError, match=r"labels: expected values .*, got -100 in task \(1,\)"):
        head(support, labels, query, mask=mask, allow_missing_classes=True)


def test_a_task_with_fewer_classes_than_its_neighbor():
    support, query = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]])
    for options in ({}, {"ways": 3}):
        with pytest.raises(InputError, match=r"no example of class 2 in task \(1,\); pass the number of classes"):
            SVMHead()(support, labels, query, **options)
    assert (SVMHead()(support, labels, query, ways=[3, 2])[1, :, 2] == -torch.inf).all()


def test_without_validation_classes_may_lack_examples():
    support, labels, query, _ = task(2)
    expected = RidgeHead()(support, labels, query, ways=4, allow_missing_classes=True)
    assert torch.equal(RidgeHead(validate=False)(support, labels, query, ways=4), expected)


class Reads(TorchDispatchMode):
    """Counts the values that are read, each of which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_check_waits_for_no_device_of_its_own():
    support, labels, _, ways = task(2)
    counts = []
    for allow in (False, True):
        with Reads() as reads:
            RidgeHead().fit(support, labels, ways=ways, allow_missing_classes=allow)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_labels_far_from_zero_are_refused_in_little_memory():
    """A head would need a terabyte for their one-hot matrix."""
    with pytest.raises(InputError, match="no example of class 0 in the task"):
        SVMHead()(torch.randn(1000, 2), torch.arange(1000) + 1_000_000, torch.randn(1, 2))


def test_errors_of_missing_classes_under_vmap():
    support, labels, query, _ = task(3)
    labels[1, labels[1] == 0] = 2
    with pytest.raises(InputError, match=r"no example of class 0 in task \(1,\)"):
        torch.vmap(lambda s, y, q: SVMHead()(s, y, q, ways=3))(support, labels, query)
    shared = torch.vmap(lambda s, q: SVMHead()(s, labels[0], q))(support, query)
    torch.testing.assert_close(shared, SVMHead()(support, labels[0], query))


def test_missing_classes_against_sets():
    """The rule, spelled out in sets of numbers, for any labels, masks and ways."""

    @examples(150, nightly=3000)
    @given(st.data())
    def check(data):
        tasks, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
        row = st.lists(st.integers(0, 4), min_size=n, max_size=n)
        labels = data.draw(st.lists(row, min_size=tasks, max_size=tasks))
        mask = [[data.draw(st.booleans()) or i == 0 for i in range(n)] for _ in range(tasks)]
        allow, head = data.draw(st.booleans()), data.draw(st.sampled_from([RidgeHead(), PrototypeHead()]))
        kind = data.draw(st.sampled_from(["none", "int", "list"]))
        shown = [{y for y, keep in zip(*pair, strict=True) if keep} for pair in zip(labels, mask, strict=True)]
        sizes = [max(classes) + 1 + data.draw(st.integers(0, 2)) for classes in shown]
        ways = {"none": max(map(max, shown)) + 1, "int": max(sizes), "list": sizes}[kind]
        needed = ways if kind == "list" else [ways] * tasks
        if kind == "list" and not head.requires_all_classes:
            needed = [max(classes) + 1 for classes in shown]
        lacking = any(set(range(k)) - classes for k, classes in zip(needed, shown, strict=True))
        options = {} if kind == "none" else {"ways": ways}
        support, query = torch.randn(tasks, n, 3), torch.randn(tasks, 1, 3)
        if lacking and (head.requires_all_classes or not allow):
            with pytest.raises(InputError, match="no example of class"):
                head(support, labels, query, mask=mask, allow_missing_classes=allow, **options)
        else:
            logits = head(support, labels, query, mask=mask, allow_missing_classes=allow, **options)
            assert logits.shape[-1] == (max(ways) if kind == "list" else ways)

    check()


# Labels and masks of one task for all ---------------------------------------------------------------------------------


@all_heads
@pytest.mark.parametrize("batch", [(4,), (2, 3), (6,), (0,)], ids=str)
def test_labels_and_mask_of_one_task_are_those_of_all(head, batch):
    """Also for as many tasks as examples."""
    support, query = torch.randn(*batch, 6, 5), torch.randn(*batch, 3, 5)
    labels, mask = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([True] * 5 + [False])
    expected = head(support, labels.expand(*batch, 6), query, mask=mask.expand(*batch, 6), ways=3)
    assert torch.equal(head(support, labels, query, mask=mask, ways=3), expected)


def test_mask_of_one_task_for_regression():
    support, targets, query = torch.randn(4, 6, 5), torch.randn(4, 6), torch.randn(4, 3, 5)
    mask = torch.tensor([True] * 5 + [False])
    expected = RidgeRegressionHead()(support[:, :5], targets[:, :5], query)
    torch.testing.assert_close(RidgeRegressionHead()(support, targets, query, mask=mask), expected)


# What is accepted in place of a tensor --------------------------------------------------------------------------------


class Series:
    """What pandas and others have: not NumPy's, but NumPy can read it."""

    def __init__(self, values):
        self.values, self.ndim = values, values.ndim

    def __array__(self, *args, **kwargs):
        return np.asarray(self.values, *args, **kwargs)


def frozen(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.setflags(write=False)
    return values


FORMS = {
    "array": lambda x: x.numpy(),
    "read-only array": lambda x: frozen(x.numpy()),
    "backward array": lambda x: x.flip(0).numpy()[::-1],
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(x.tolist()),
    "list of arrays": lambda x: list(x.numpy()),
    "list of tensors": list,
    "other": lambda x: Series(x.numpy()),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@forms
def test_heads_take_arrays_and_lists(form):
    support, labels, query, _ = task(2, dtype=torch.float32)
    mask, ways = torch.arange(6) < torch.tensor([[6], [6]]), torch.tensor([3, 3])
    expected = SVMHead()(support, labels, query, ways=ways, mask=mask)
    found = SVMHead()(form(support), form(labels), form(query), ways=form(ways), mask=form(mask))
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    values = torch.randn(2, 6)
    wanted = GaussianProcessHead().fit(support, values, mask=mask)
    fitted = GaussianProcessHead().fit(form(support), form(values), mask=form(mask))
    assert torch.equal(fitted(form(query)), wanted(query))
    assert torch.equal(fitted.variance(form(query)), wanted.variance(query))


def test_arrays_keep_their_dtype():
    support, labels, query, _ = task(2)
    logits = RidgeHead()(support.numpy(), labels.numpy().astype(np.uint8), query.numpy())
    assert logits.dtype == torch.float64
    assert torch.equal(logits, RidgeHead()(support, labels, query))
    assert RidgeHead()(support.float().numpy(), labels, query).dtype == torch.float32


def test_a_list_of_tensors_keeps_their_gradients():
    rows = [torch.randn(3, requires_grad=True) for _ in range(4)]
    RidgeHead()(rows, [0, 1, 0, 1], torch.randn(2, 3)).sum().backward()
    assert all(row.grad.abs().sum() > 0 for row in rows)


@forms
def test_evaluation_and_loader_take_arrays_and_lists(form):
    features, labels = clusters()
    options = {"shots": 2, "queries": 3, "episodes": 8, "progress": False}
    expected = evaluate(RidgeHead(), features, labels, **options)
    found = evaluate(RidgeHead(), form(features), form(labels), **options)
    assert torch.equal(found.accuracies, expected.accuracies)
    assert found.compare(expected).mean == 0
    scales = [
        calibrate(RidgeHead(), *data, **options).scale.value
        for data in ((features, labels), (form(features), form(labels)))
    ]
    assert scales[0] == scales[1]
    loaders = [
        EpisodeLoader(*data, shots=1, queries=2) for data in ((features, labels), (form(features), form(labels)))
    ]
    (samples, _), (wanted, _) = (next(iter(loader)) for loader in loaders)
    assert torch.equal(samples, wanted)


@forms
def test_tasks_in_arrays_and_lists_are_split(form):
    data, labels = torch.randn(2, 6, 3), torch.tensor([[0, 1] * 3] * 2)
    for found, expected in zip(
        split_task(form(data), form(labels), shots=1), split_task(data, labels, shots=1), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_arrays_go_where_the_support_is(cuda):
    support, labels, query, _ = task(2, dtype=torch.float32)
    expected = RidgeHead()(support, labels, query, ways=3)
    found = RidgeHead()(support.to(cuda), labels.numpy(), query.numpy(), ways=[3, 3], mask=[True] * 6)
    torch.testing.assert_close(found.cpu(), expected)


# Renumbering ----------------------------------------------------------------------------------------------------------


def test_split_renumbers_the_labels_of_each_task():
    """As `unique` numbers each row alone, in support and query by the same map."""
    numbers = torch.tensor([[5, 40, 7], [7, 300, -2], [0, 1, 2], [2**40, 3, 2**41]])
    labels = torch.stack([row[torch.arange(12) % 3][torch.randperm(12)] for row in numbers]).view(2, 2, 12)
    data = torch.randn(2, 2, 12, 4)
    plain, found = split_task(data, labels, shots=2), split_task(data, labels, shots=2, relabel=True)
    assert torch.equal(found.support, plain.support)
    assert torch.equal(found.query, plain.query)
    for i in range(2):
        for j in range(2):
            names = labels[i, j].unique()
            assert torch.equal(names[found.support_labels[i, j]], plain.support_labels[i, j])
            assert torch.equal(names[found.query_labels[i, j]], plain.query_labels[i, j])
    PrototypeHead()(found.support, found.support_labels, found.query, ways=3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint32])
def test_renumbered_labels_are_int64(dtype):
    episode = split_task(torch.randn(6, 2), torch.tensor([9, 8] * 3).to(dtype), shots=1, relabel=True)
    assert episode.support_labels.tolist() == [1, 0]
    assert episode.query_labels.dtype == torch.int64


def test_relabel_is_true_or_false():
    with pytest.raises(InputError, match="relabel: expected True or False"):
        split_task(torch.randn(6, 2), torch.tensor([9, 8] * 3), shots=1, relabel="yes")
