"""Writes the packed file that the engine runs."""
