"""Programs that made data/: each one's results are committed beside the command that made them."""
