"""Exports: pipeline folders, LoRA files, single files and ONNX graphs, verified against the trainer's own samples."""

from distill.export.write import export

__all__ = ["export"]
