"""One runnable file for each way of use, and the demo.

Knows what users know: public names only. Nothing below imports from here.
"""
