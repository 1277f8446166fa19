"""Lesson 01: Why can I not just fine-tune a 7B model?"""
