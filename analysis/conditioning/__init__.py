"""How ill-conditioned a loss is, where, and what preconditioners gain."""
