"""Dive I: Is 0.9677083 the best offset?"""
