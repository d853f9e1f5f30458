"""The harness of the paper's tables: every method beside its baselines on the same data. Nothing
but the command line imports it.
"""
