"""Lesson 03: Which 16 numbers are best?"""
