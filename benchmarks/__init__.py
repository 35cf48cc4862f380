"""Speed as ratios: two programs that do the same work side by side, in turn, in one call."""
