"""What autograd needs help with: graphs it would differentiate wrongly, not at all, or at too high a price."""
