"""The engine: the loss of one batch, recorded once and differentiated many times."""
