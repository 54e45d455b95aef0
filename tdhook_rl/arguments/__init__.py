"""Arguments are checked where they are given, and keys taken apart.

Knows signatures and annotations only; what an argument is for belongs to the class that takes it.
"""
