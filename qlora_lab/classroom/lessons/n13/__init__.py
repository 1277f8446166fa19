"""Lesson 13: Why is QLoRA slow, and what makes it fast?"""
