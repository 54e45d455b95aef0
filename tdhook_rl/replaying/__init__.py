"""A second pass that starts where the first did: its state, its noise, its samples.

Knows how to run a policy again without a trace; not why, nor what is computed of it.
"""
