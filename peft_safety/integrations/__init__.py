"""Plugins with which other frameworks select the protected configs from their own config file. Each module imports its
framework; nothing else of this package imports them.
"""
