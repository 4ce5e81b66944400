"""Learning rates: the largest stable one, the best one, and what a warm-up does."""
