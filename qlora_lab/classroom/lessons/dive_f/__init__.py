"""Dive F: Why is QLoRA slow, and what makes it fast?"""
