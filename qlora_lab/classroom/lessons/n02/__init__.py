"""Lesson 02: What is lost with fewer bits?"""
