"""Lesson 12: What do tutorials get wrong?"""
