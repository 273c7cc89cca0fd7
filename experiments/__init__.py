"""Command-line experiments with `otfusion_jax`: train models, fuse them, report what was lost."""
