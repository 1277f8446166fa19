"""Dive K: Equal to the last bit?"""
