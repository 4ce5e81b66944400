"""Newton's family: optimizers that solve for a step jointly over all parameters."""
