"""SOMF: fuse a safe model with fine-tuned ones through a learned mask; and the usual fusions without one."""

from peft_safety.methods.somf.fusing import fuse
from peft_safety.methods.somf.masks import Masks, export
from peft_safety.methods.somf.options import FuseOptions, MaskTraining
from peft_safety.methods.somf.plan import FusePlan, plan_fusion
from peft_safety.methods.somf.report import FuseReport
from peft_safety.methods.somf.storage import load_masks, save_logits, save_masks

__all__ = [
    "FuseOptions",
    "FusePlan",
    "FuseReport",
    "MaskTraining",
    "Masks",
    "export",
    "fuse",
    "load_masks",
    "plan_fusion",
    "save_logits",
    "save_masks",
]
