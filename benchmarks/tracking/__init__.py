"""Following eigenpairs along a training run."""
