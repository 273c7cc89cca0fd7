"""Checkpoints on disk: read with every claim checked, and written whole or not at all."""
