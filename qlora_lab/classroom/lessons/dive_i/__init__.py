"""Dive I: Which card is large enough?"""
