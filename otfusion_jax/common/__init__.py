"""What every other room uses: ranges of floating-point numbers, batching, checks of arguments."""
