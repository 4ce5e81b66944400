"""What all records share: numbers with their errors, and plain values for JSON."""
