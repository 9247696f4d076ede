"""Where an adapter's update lies in relation to the weights under it, each figure beside its null; and what it does to
general and harmful inputs.
"""

from peft_safety.audit.report import ModuleOrthogonality, OrthogonalityReport, orthogonality_report

__all__ = ["ModuleOrthogonality", "OrthogonalityReport", "orthogonality_report"]
