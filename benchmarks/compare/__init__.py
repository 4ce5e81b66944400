"""False alarms and power of comparisons."""
