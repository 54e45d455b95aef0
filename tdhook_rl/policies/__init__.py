"""What a policy holds, draws and decides, read from its modules before and while it runs.

Knows policies as their users wrote them, hooked or not; neither calls nor methods.
"""
