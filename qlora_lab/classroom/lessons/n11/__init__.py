"""Lesson 11: What did 4 bits cost?"""
