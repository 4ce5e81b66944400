"""Trainings side by side that differ in one thing: labels that carry nothing, or a regulariser."""
