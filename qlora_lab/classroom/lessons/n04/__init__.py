"""Lesson 04: What do the scales cost?"""
