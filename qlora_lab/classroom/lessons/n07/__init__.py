"""Lesson 07: What happens when the base is 4-bit?"""
