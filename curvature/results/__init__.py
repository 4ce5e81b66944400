"""What estimators and solvers return, and the intervals around it."""
