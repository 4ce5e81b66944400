"""Growth with parameters, examples and eigenpairs."""
