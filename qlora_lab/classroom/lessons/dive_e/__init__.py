"""Dive E: Beyond QLoRA."""
