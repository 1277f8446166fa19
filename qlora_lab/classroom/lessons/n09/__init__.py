"""Lesson 09: What did 4 bits cost?"""
