"""What is known of loss functions: their matrices on the outputs, and how batches are weighted."""
