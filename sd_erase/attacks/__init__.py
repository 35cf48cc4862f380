"""Attacks on an erased encoder: is the concept really gone, or only its words?"""
