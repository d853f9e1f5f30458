"""Tests inside the hosts. Folders named as the hosts are, on the path, would be imported for them;
here they are parts of a package.
"""
