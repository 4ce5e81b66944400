"""Products, eigenpairs, steps and memory on a GPU."""
