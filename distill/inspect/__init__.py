"""Tools around runs: checks, plan, report, bench, comparisons."""
