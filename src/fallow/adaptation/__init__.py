"""Adaptation: a dense model learns, from itself, to do without its inactive neurons."""
