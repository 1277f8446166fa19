"""Lesson 04: Which sixteen numbers are best?"""
