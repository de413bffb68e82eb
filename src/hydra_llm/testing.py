"""Contract checks for plug-ins: call one from a test of your own package.

Each raises AssertionError with what is broken. The built-in parts pass them too.
"""
