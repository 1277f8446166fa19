"""Dive G: More than one card."""
