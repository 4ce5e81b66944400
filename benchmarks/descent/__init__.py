"""Double descent, and what training side by side saves."""
