"""A head in SetFit: class weights, probabilities, files, and the fitted head as an `nn.Linear`.

python docs/examples/setfit_head.py      # a tiny BERT with random weights; nothing is downloaded
"""

import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from setfit import SetFitModel
from transformers import BertConfig, BertModel, BertTokenizerFast

from convexheads import LogisticHead
from convexheads.integrations.sklearn import HeadClassifier

TEXTS = {  # the classes have six, three and two texts
    "sea": ["a ship in the harbor", "waves and salt", "salt water", "a ship", "the harbor", "waves in the water"],
    "sky": ["clouds and wind", "a bird", "wind above the clouds"],
    "city": ["streets and houses", "the houses"],
}


def tiny_body(folder: Path) -> SentenceTransformer:
    """A BERT with random weights, saved in a folder. A real one: `SentenceTransformer("all-MiniLM-L6-v2")`."""
    words = sorted({word for texts in TEXTS.values() for text in texts for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=5 + len(words), **sizes)).save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


texts = [text for own in TEXTS.values() for text in own]
labels = [label for label, own in TEXTS.items() for _ in own]
# SetFit's default is scikit-learn's LogisticRegression(), which has the same regularization and an intercept.
classifier = HeadClassifier(LogisticHead(1.0, intercept=True, class_weight="balanced"))
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    model = SetFitModel(model_body=tiny_body(folder), model_head=classifier)
    model.fit(texts, labels, num_epochs=1)  # the last step of `setfit.Trainer.train()`, which also trains the body
    model.save_pretrained(folder / "saved")
    # SetFit saves its head with joblib. So load only files that you trust, where this library is installed.
    loaded = SetFitModel.from_pretrained(str(folder / "saved"))

text = "waves above the harbor"
probabilities = loaded.predict_proba(texts)
print(f"'{text}':", loaded.predict(text), dict(zip(loaded.labels, loaded.predict_proba(text).tolist(), strict=True)))
print("difference after loading:", (probabilities - model.predict_proba(texts)).abs().max().item())

# The classifier as a layer that needs neither this library nor scikit-learn, with the scale of the calibration.
linear = classifier.to_linear()
with torch.no_grad():
    layer = linear(torch.tensor(model.encode(texts))).softmax(-1)
print("difference of the layer:", (layer - probabilities).abs().max().item())
