"""A classification task of MTEB with a head as its classifier, in place of scikit-learn's logistic regression.

python docs/examples/mteb_evaluator.py      # an encoder with random vectors and made-up texts; nothing is downloaded
"""

import random

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.models.abs_encoder import AbsEncoder

from convexheads import LogisticHead, TunedHead
from convexheads.integrations.sklearn import HeadClassifier

TOPICS = [
    ["card", "chip", "pin", "plastic", "swallowed"],
    ["transfer", "payee", "sent", "arrived", "account"],
    ["euro", "dollar", "rate", "currency", "abroad"],
]


class RandomVectors(AbsEncoder):
    """The mean of one random vector per word. A real encoder: `mteb.get_model("intfloat/e5-small-v2")`."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.vectors = {word: generator.normal(size=32) for topic in TOPICS for word in topic}

    def encode(self, inputs, **options):
        texts = [text for batch in inputs for text in batch["text"]]
        return np.stack([np.mean([self.vectors[word] for word in text.split()], axis=0) for text in texts])


def made_up_texts(number: int, seed: int) -> Dataset:
    """Texts in which three words are of the label's topic, and three of a random one."""
    draw = random.Random(seed)  # noqa: S311, not for secrets
    labels = [draw.randrange(len(TOPICS)) for _ in range(number)]
    words = [draw.choices(TOPICS[label], k=3) + draw.choices(draw.choice(TOPICS), k=3) for label in labels]
    return Dataset.from_dict({"text": [" ".join(own) for own in words], "label": labels})


task = mteb.get_task("Banking77Classification.v2")
# These lines replace the download. Leave them out to use the real data.
task.dataset = DatasetDict(train=made_up_texts(100, seed=0), test=made_up_texts(100, seed=1))
task.data_loaded = True

# scikit-learn's default has C=1 and an intercept, as the first head does. MTEB asks only for predictions, so calibrated
# probabilities are not needed. It fits the same object to each of ten training sets with eight examples per class.
head = LogisticHead(1.0, intercept=True)
tuned = TunedHead(LogisticHead(intercept=True), {"regularization": [10.0**power for power in range(2, -4, -1)]}, cv=4)
evaluators = {
    "scikit-learn": task.evaluator_model,
    "head": HeadClassifier(head, calibrate=False),
    "tuned head": HeadClassifier(tuned, calibrate=False),
}
for name, evaluator in evaluators.items():
    task.evaluator_model = evaluator
    # MTEB's cache of results does not know which classifier gave them, so do not use it with another classifier.
    result = mteb.evaluate(RandomVectors(), task, cache=None, show_progress_bar=False)[0]
    print(f"{name}: {100 * result.get_score():.1f}%")
