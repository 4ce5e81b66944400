"""Pretrained models that packages ship, looked at by the command."""
