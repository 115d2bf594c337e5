"""The engine of the `transformers` provider: PyTorch models with continuous batching, in a process of its own."""
