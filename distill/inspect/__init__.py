"""Look at runs: checks, plan, report, bench, comparisons."""
