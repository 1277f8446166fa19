"""Lesson 05: Why does a low rank suffice?"""
