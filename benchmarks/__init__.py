"""Speed, as ratios within one run; see each file for its command."""
