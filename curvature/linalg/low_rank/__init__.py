"""Low-rank approximations."""
