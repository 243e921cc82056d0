"""Backbones, heads with published settings, and the weights that the package contains."""

from convexheads.models.backbone import Backbone
from convexheads.models.networks import BACKBONES, Conv4, DropBlock, R2D2Network, ResNet12, build_backbone
from convexheads.models.presets import (
    TRAINING_HEADS,
    build_head,
    metaoptnet_ridge,
    metaoptnet_svm,
    protonet,
    r2d2,
    unit_scale_logistic,
    unit_scale_ridge,
    unit_scale_svm,
)
from convexheads.models.pretrained import Pretrained, build_model, list_pretrained, load_pretrained, save_pretrained

__all__ = ["BACKBONES", "Backbone", "Conv4", "DropBlock", "R2D2Network", "ResNet12", "build_backbone"]
__all__ += ["TRAINING_HEADS", "build_head", "metaoptnet_ridge", "metaoptnet_svm", "protonet", "r2d2"]
__all__ += ["unit_scale_logistic", "unit_scale_ridge", "unit_scale_svm"]
__all__ += ["Pretrained", "build_model", "list_pretrained", "load_pretrained", "save_pretrained"]
