"""What all benchmarks share: harness, problems, peers, rows and reports."""
