"""Why over-parameterised networks generalise, and what curvature says of it."""
