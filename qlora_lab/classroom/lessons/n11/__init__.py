"""Lesson 11: How do I use it?"""
