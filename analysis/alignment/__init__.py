"""How gradients, updates and classes lie to the directions of largest curvature."""
