"""Lesson 06: Why does a low rank suffice?"""
