"""The loss away from a point: lines, planes and paths."""
