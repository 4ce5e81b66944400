"""Benchmarks: rows of JSON, and the tables made from them. See README.md beside this file."""
