"""What is private to Python, torch, tensordict and torchrl, and used all the same.

Another version may change it without a word, so it is reached in this room alone, by library: each function or alias
says what it uses and why the public interface does not do. Knows nothing of the rest of this package.
"""
