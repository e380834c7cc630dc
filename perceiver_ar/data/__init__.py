"""From prepared files to batches of NumPy arrays: no device is touched."""
