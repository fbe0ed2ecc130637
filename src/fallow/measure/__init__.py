"""Quality, sparsity and speed of models and plans."""
