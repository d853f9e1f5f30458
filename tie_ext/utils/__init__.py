"""What every room uses and no paper is about: checks at the border, settings, files, several
processes, random streams, modes of modules.
"""
