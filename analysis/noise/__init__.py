"""The noise of stochastic gradients."""
