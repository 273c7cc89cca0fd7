"""Stacking, averaging and interpolating models of one structure."""
