"""Lesson 04: Which 16 numbers are best?"""
