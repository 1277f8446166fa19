"""Lesson 10: Which knob buys what?"""
