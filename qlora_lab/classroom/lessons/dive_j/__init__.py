"""Dive J: How few bits can the base have?"""
