"""Relations between measured quantities."""
