"""Statistics of gradient noise."""
