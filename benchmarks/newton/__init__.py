"""Newton's family on published problems and networks."""
