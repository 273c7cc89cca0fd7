"""Models of one structure combined leaf by leaf: stacked, averaged, interpolated."""
