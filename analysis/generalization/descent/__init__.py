"""Double descent: test error along width, epochs or examples, with the interpolation threshold and curvature."""
