"""The command line: runs on disk, image sets, scores of a network, reports. The rooms below know
nothing of it.
"""
