"""How other libraries' models and batches become an objective."""
