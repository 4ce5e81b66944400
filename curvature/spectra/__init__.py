"""Spectra of curvature matrices: eigenpairs, densities, counts, and what they will cost."""
