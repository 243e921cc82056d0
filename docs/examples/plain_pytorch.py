"""Meta-training without any framework: mixed precision, gradient accumulation, a compiled backbone, several processes.

python docs/examples/plain_pytorch.py      # the digits are scikit-learn's
torchrun --nproc-per-node 2 docs/examples/plain_pytorch.py
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from convexheads import EpisodeLoader, PrototypeHead, embed, evaluate, split_task
from convexheads.models import unit_scale_svm

WAYS, SHOTS, ACCUMULATE = 3, 5, 2


class Learner(nn.Module):
    """A backbone and a head: from images and labels of episodes to the loss."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
        self.head = unit_scale_svm()

    def forward(self, images, labels):
        features = self.backbone(images.flatten(0, 1)).unflatten(0, labels.shape)
        support, support_labels, query, query_labels = split_task(features.float(), labels, shots=SHOTS)
        logits = self.head(support, support_labels, query, ways=WAYS)
        return nn.functional.cross_entropy(logits.mT, query_labels)


if "RANK" in os.environ:  # set by torchrun
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
known = labels < 6
torch.manual_seed(0)
learner = Learner().to(device)
parallel = DistributedDataParallel(learner) if processes > 1 else learner
optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
share = {"rank": rank, "world_size": processes}  # every process has its share of the same episodes
loader = EpisodeLoader(images[known], labels[known], ways=WAYS, shots=SHOTS, batch_size=8, steps_per_epoch=100, **share)
for step, (samples, targets) in enumerate(loader, 1):
    with torch.autocast(device.partition(":")[0], torch.bfloat16):
        loss = parallel(samples.to(device), targets.to(device)) / ACCUMULATE
    loss.backward()
    if step % ACCUMULATE == 0:
        optimizer.step()
        optimizer.zero_grad()

if rank == 0:
    features = embed(learner.backbone, images[~known], progress=False)
    settings = {"ways": WAYS, "shots": SHOTS, "episodes": 500, "progress": False}
    print("unseen digits:", evaluate(learner.head, features, labels[~known], **settings))
    print("prototypes on the same features:", evaluate(PrototypeHead(), features, labels[~known], **settings))
    # Six digits teach a network little, so the pixels are better features. The quickstart has enough classes.
    pixels = images[~known].flatten(1)
    print("prototypes on pixels:", evaluate(PrototypeHead(), pixels, labels[~known], **settings))
if distributed.is_initialized():
    distributed.destroy_process_group()
