"""Dive D: Which knob buys what?"""
