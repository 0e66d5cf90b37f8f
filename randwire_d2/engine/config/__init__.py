"""The config of a training: its keys, and all that can be known to fail before any work."""
