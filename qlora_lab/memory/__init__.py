"""Bytes: what a training step will need (`estimate`, pure arithmetic) and what it did need (`measure`)."""
