"""An optimizer that was trained itself."""
