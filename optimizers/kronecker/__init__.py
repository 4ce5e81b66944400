"""Optimizers that precondition matrices, each with AdamW inside for everything that is none."""
