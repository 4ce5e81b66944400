"""Models in parts on several processes."""
