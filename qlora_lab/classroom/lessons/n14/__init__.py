"""Lesson 14: More than one card."""
