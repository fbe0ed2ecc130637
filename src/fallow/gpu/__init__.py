"""Sparse decoding of transformers models on CUDA: neurons that a plan leaves out are not read."""
