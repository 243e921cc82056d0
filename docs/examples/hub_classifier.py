"""A fitted head as a model of the Hugging Face Hub: it is saved as safetensors, and loads without this library.

python docs/examples/hub_classifier.py      # the digits are scikit-learn's; nothing is downloaded or uploaded
"""

import tempfile

import torch
from huggingface_hub import PyTorchModelHubMixin
from sklearn.datasets import load_digits
from torch import nn

from convexheads.models import unit_scale_logistic


class LinearClassifier(nn.Module, PyTorchModelHubMixin, tags=["few-shot", "convexheads"]):
    """A linear classifier of features, whose arguments are saved in `config.json`."""

    def __init__(self, features: int, classes: list[str]):
        super().__init__()
        self.classes = classes
        self.linear = nn.Linear(features, len(classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)


digits = load_digits()
# Parameters of a module that is loaded are in float32, so the features are too.
features, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
support = torch.cat([(labels == label).nonzero()[:5, 0] for label in range(10)])  # five examples of each digit
fitted = unit_scale_logistic().fit(features[support], labels[support])

classifier = LinearClassifier(features.shape[1], [f"digit {label}" for label in range(10)])
classifier.linear = fitted.to_linear()  # the same scores as those of `fitted`

with tempfile.TemporaryDirectory() as folder:
    classifier.save_pretrained(folder)  # config.json and model.safetensors
    loaded = LinearClassifier.from_pretrained(folder)
# To publish it, log in with `hf auth login`, and use the name of a repository in place of the folder:
#   classifier.push_to_hub("your-name/digits-five-shot")
#   loaded = LinearClassifier.from_pretrained("your-name/digits-five-shot")

with torch.no_grad():
    logits = loaded(features)
    difference = (logits - fitted(features)).abs().max().item()
accuracy = (logits.argmax(-1) == labels).float().mean().item()
print(f"accuracy of the loaded classifier: {100 * accuracy:.1f}%")
print(f"largest difference from the logits of the fitted head: {difference:.1e}")
print(f"the first image shows: {loaded.classes[logits[0].argmax()]}")
