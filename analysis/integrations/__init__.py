"""The tracker in other people's training loops and logs; what they come from is imported when it is used."""
