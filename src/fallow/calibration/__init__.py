"""From a model and a text to plans."""
