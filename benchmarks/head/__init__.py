"""The last layer and its cross-entropy in blocks: memory and time beside logits that are whole."""
