"""Files that survive a loss of power, and checks of what anybody may have put into one.

Knows nothing of policies: what is written is for the rooms above to say.
"""
