"""Dive C: Is that difference real?"""
