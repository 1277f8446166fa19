"""Lesson 13: What do tutorials get wrong?"""
