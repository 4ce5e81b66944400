"""Per-example gradients beside other libraries."""
