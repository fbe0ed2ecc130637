"""Models in transformers, dense or with a plan's values set to zero."""
