"""Students (and teachers) as stock diffusers folders, and the proof that stock diffusers samples from them as we do."""

from distill.export.folder import export

__all__ = ["export"]
