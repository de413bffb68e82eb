"""The black boxes: one interface, several engines, a cache and a meter around any of them (DESIGN
6).
"""
