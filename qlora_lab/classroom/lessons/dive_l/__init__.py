"""Dive L: Which card is large enough?"""
