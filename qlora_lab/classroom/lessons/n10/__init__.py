"""Lesson 10: Was the prediction right?"""
