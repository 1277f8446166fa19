"""Lesson 02: Why can I not just fine-tune a 7B model?"""
