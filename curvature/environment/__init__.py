"""What surrounds a computation: autocast, precision, memory, clocks, and one lock for state of the process."""
