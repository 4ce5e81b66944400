"""First-order methods that torch does not have, and methods that find their step length by themselves."""
