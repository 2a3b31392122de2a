"""What everything that holds tensors shares: streams, staging buffers, copies, digests of weights, names of devices.

Knows no model.
"""
