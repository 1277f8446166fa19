"""Lesson 01: Can I train a real LLM here, now?"""
