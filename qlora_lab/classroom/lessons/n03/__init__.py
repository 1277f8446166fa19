"""Lesson 03: What is lost with fewer bits?"""
