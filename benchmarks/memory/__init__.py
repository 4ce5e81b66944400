"""Peak memory of eigenpairs."""
