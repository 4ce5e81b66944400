"""Implicit regularization: what finite steps add to the loss."""
