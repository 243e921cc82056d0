"""Few-shot classification of files, from Python and as the command `convexheads`."""

from convexheads.cli.folder import FolderClassifier, Prediction, choose_features

__all__ = ["FolderClassifier", "Prediction", "choose_features"]
