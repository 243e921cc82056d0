"""A prototypical network on learn2learn's tasks, with a head in the place of the prototypes: two lines differ.

python docs/examples/learn2learn_protonet.py      # the digits are scikit-learn's
"""

import random

import learn2learn as l2l
import torch
from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from convexheads import SVMHead, split_task

WAYS, SHOTS, QUERIES = 3, 5, 5


def tasks(images: torch.Tensor, labels: torch.Tensor) -> l2l.data.Taskset:
    """Tasks of some of the digits."""
    dataset = l2l.data.MetaDataset(TensorDataset(images, labels))
    transforms = [NWays(dataset, WAYS), KShots(dataset, SHOTS + QUERIES), LoadData(dataset)]
    return l2l.data.Taskset(dataset, [*transforms, RemapLabels(dataset), ConsecutiveLabels(dataset)])


def fast_adapt(task, backbone: nn.Module, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the accuracy of one task."""
    data, labels = task
    support, support_labels, query, labels = split_task(backbone(data), labels, shots=SHOTS)
    # was: prototypes = support.reshape(WAYS, SHOTS, -1).mean(dim=1)
    fitted = head.fit(support, support_labels, ways=WAYS)
    # was: logits = pairwise_distances_logits(query, prototypes)
    logits = fitted(query)
    return nn.functional.cross_entropy(logits, labels), l2l.utils.accuracy(logits, labels)


digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
known = labels < 6
torch.manual_seed(0)
random.seed(0)  # which learn2learn draws its tasks from
backbone, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), SVMHead(C=0.1)
optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-3)
train, test = tasks(images[known], labels[known]), tasks(images[~known], labels[~known])
for _ in range(200):
    loss, _ = fast_adapt(train.sample(), backbone, head)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    accuracies = torch.stack([fast_adapt(test.sample(), backbone, head)[1] for _ in range(100)])
print(f"unseen digits: {100 * accuracies.mean():.1f} %")
