"""Critical points: minimum, saddle, plateau, or none."""
