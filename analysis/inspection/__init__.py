"""Inspection: the spectrum of the Hessian, as a whole and layer by layer."""
