"""Runs packed models with the compiled core: no torch, no transformers."""
