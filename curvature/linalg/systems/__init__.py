"""Linear systems, least squares and trust-region subproblems."""
