"""What was found, as pictures: drawn on axes of matplotlib, which nothing else depends on."""
