"""Dive H: How do I use it?"""
