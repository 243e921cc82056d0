"""Zero-shot weights of CLIP's text encoder as the prior of a head, which a few images per class improve.

python docs/examples/open_clip_prior.py      # a tiny CLIP model with random weights; nothing is downloaded
"""

import open_clip
import torch

from convexheads import LogisticHead, tune

CLASSES, SHOTS, QUERIES = ("red", "green", "blue", "gray"), 4, 25

# With a real model:
#   model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained="laion2b_s34b_b79k")
#   tokenizer = open_clip.get_tokenizer("ViT-B-32")
torch.manual_seed(0)
vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32}
text = {"context_length": 77, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 2}
model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
tokenizer = open_clip.SimpleTokenizer()


def images(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of the four colors, and their labels."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(number)
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    return colors[labels][:, :, None, None] + torch.randn(len(labels), 3, 32, 32), labels


support_images, labels = images(SHOTS)
query_images, query_labels = images(QUERIES)
with torch.no_grad():
    # CLIP's logits are the cosines times its temperature. The weights of the classes include the temperature, so that
    # the head minimizes the loss of CLIP's own probabilities.
    prompts = tokenizer([f"a {name} photo" for name in CLASSES])
    prior = model.logit_scale.exp() * model.encode_text(prompts, normalize=True)
    support = model.encode_image(support_images, normalize=True)
    query = model.encode_image(query_images, normalize=True)


def accuracy(logits: torch.Tensor) -> str:
    """The accuracy of logits of the query images."""
    return f"{100 * (logits.argmax(-1) == query_labels).float().mean().item():.1f}%"


zero_shot = query @ prior.mT
print("zero-shot:", accuracy(zero_shot))

# With a strong regularizer, the weights stay at the prior. Examples move them as it becomes weaker.
strong = LogisticHead(1e6)(support, labels, query, prior=prior)
print("strong regularizer:", accuracy(strong), f"(logits differ by {(strong - zero_shot).abs().max():.0e})")
print("weak regularizer:", accuracy(LogisticHead(1e-3)(support, labels, query, prior=prior)))

# Cross-validation on the few examples finds how far to trust the prior. The strongest regularizer wins among equals.
grid = {"regularization": [10.0**power for power in range(6, -5, -1)]}
tuned = tune(LogisticHead(), grid, support, labels, cv=SHOTS, prior=prior, scoring="log_loss", progress=False)
print("tuned:", accuracy(tuned.fitted(query)), f"(regularization {tuned.values['regularization']:g})")
