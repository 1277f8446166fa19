"""Lesson 18: Beyond QLoRA."""
