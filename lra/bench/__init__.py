"""What layers, models and functions cost: counted from their programs, and timed."""
