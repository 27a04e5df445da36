"""The benchmark on a GPU, beside PyTorch's own attention there."""
