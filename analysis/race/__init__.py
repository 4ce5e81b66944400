"""Races of optimizers: the same budget for each, rates searched, seeds paired, and who is ahead by tests."""
