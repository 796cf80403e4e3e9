"""Students (and teachers) in the forms that others load, and the proof that they sample there as they do here."""

from distill.export.ship import export

__all__ = ["export"]
