"""The learned optimizer: its meta-training, and what it does on tasks like those it was trained on and on others."""
