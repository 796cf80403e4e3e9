"""`distill report`: one self-contained offline HTML page with samples, quality against cost, curves, cost and config."""

from distill.inspect.report.page import report

__all__ = ["report"]
