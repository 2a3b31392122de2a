"""What everything that holds tensors shares: staging buffers, digests of weights, names of devices. Knows no model."""
