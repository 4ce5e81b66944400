"""Eigenpairs of hard matrices: is any missed?"""
