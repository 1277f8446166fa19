"""Lesson 00: Is my machine ready?"""
