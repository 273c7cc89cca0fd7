"""From a cost matrix to a plan: exact, entropic, low-rank and quadratic optimal transport."""
