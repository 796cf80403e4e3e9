"""One page a run can be shown by: samples, quality against cost, curves, cost, config; offline and self-contained."""

from distill.inspect.report.page import report

__all__ = ["report"]
