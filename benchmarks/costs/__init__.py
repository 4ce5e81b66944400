"""What every call of the questions costs, in gradients."""
