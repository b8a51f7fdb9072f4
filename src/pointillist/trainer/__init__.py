"""The trainer. References become tensors in its data loader; the same function made the server's."""
