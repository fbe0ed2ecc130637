"""Searches for the plan that saves most at a stated loss."""
