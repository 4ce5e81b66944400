"""Batches: walking them again and again, their tensors and parts, and the random numbers they draw."""
