"""Helpers of every room: checks of input, the reader of loaders, views of modules, settings,
files, several processes, random streams.
"""
