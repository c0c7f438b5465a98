"""One training step of this project against PyTorch's, scikit-learn's and JAX's: see `__main__`."""
