"""Training without a backward pass through the network: forward gradients, direct feedback, learned updates."""
