"""Lesson 05: What do the scales cost?"""
