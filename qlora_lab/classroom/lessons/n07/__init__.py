"""Lesson 07: Can I train a real LLM here, now?"""
