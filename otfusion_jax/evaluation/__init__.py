"""What comes out: ensembles of models, and barriers along the path between two."""
