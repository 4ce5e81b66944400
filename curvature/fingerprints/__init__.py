"""Fingerprints of tensors and of Python state: has anything changed since the last look?"""
