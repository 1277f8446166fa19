"""Lesson 08: Was the prediction right?"""
