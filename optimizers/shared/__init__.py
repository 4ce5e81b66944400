"""What all optimizers share: closures, gradients, random probes, ranks, saving and settings."""
