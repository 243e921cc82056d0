"""DINO's few-shot evaluation by logistic regression, with all tries and all values of C solved as one batch.

python docs/examples/dino_log_regression.py      # the digits are scikit-learn's

DINOv2 and DINOv3 (`eval/log_regression.py`) fit one scikit-learn or cuML model for each of 45 values of C, in float64
and with an intercept, on features of a frozen backbone that they do not normalize. They choose C by the accuracy on a
validation set, of equal values the smallest. With few shots, DINOv3 repeats this for several random subsets ("tries")
of the training set and, unlike the evaluation on all examples, does not add the validation set to the final fit.
"""

import torch
from sklearn.datasets import load_digits

from convexheads import LogisticHead, tune

TRIES, SHOTS = 5, (1, 2, 5, 10)
C = 10.0 ** torch.linspace(-6, 5, 45, dtype=torch.float64)  # increasing, because the first of equal scores wins


def few_shot_subsets(labels: torch.Tensor, shots: int) -> torch.Tensor:
    """The indices of `shots` examples of each class, drawn anew for each try, `(TRIES, classes * shots)`."""
    tries = []
    for seed in range(TRIES):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        classes = [order[labels[order] == label][:shots] for label in range(int(labels.max()) + 1)]
        tries.append(torch.cat(classes))
    return torch.stack(tries)


def log_regression(train, validation, test, shots: int):
    """The top-1 accuracy and the chosen value of C of each try; each set is a pair of features and labels."""
    features, labels = train
    index = few_shot_subsets(labels, shots)
    head, grid = LogisticHead(intercept=True), {"regularization": 1 / C}  # scikit-learn's C is the inverse
    tuned = tune(head, grid, features[index], labels[index], cv=validation, progress=False)
    test_features, test_labels = test
    predicted = tuned.fitted(test_features).argmax(-1)  # every try has the same test set
    return (predicted == test_labels).double().mean(-1), 1 / torch.tensor(tuned.values["regularization"])


# Replace these lines by the features of a frozen backbone, on the device where everything should run.
digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
features, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
train, validation, test = zip(features.split([997, 300, 500]), labels.split([997, 300, 500]), strict=True)

for shots in SHOTS:
    accuracy, best = log_regression(train, validation, test, shots)
    values = ", ".join(f"{value:.2g}" for value in best)
    print(f"{shots} per class: top-1 {100 * accuracy.mean():.1f}% +- {100 * accuracy.std():.1f}, C = {values}")
