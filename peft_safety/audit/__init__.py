"""Audit of an adapter's update: its overlap with the base weights, and its effect on general and harmful inputs."""

from peft_safety.audit.report import ModuleOrthogonality, OrthogonalityReport, orthogonality_report

__all__ = ["ModuleOrthogonality", "OrthogonalityReport", "orthogonality_report"]
