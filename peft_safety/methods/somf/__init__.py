"""SOMF: fuse a safe model with fine-tuned ones through a learned mask."""

from peft_safety.methods.somf.fusing import FuseReport, fuse, plan_fusion
from peft_safety.methods.somf.masks import Masks, load_masks, save_masks
from peft_safety.methods.somf.options import FuseOptions, MaskTraining

__all__ = [
    "FuseOptions",
    "FuseReport",
    "MaskTraining",
    "Masks",
    "fuse",
    "load_masks",
    "plan_fusion",
    "save_masks",
]
