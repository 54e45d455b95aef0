"""Results of a whole batch after it was collected, and how they fit what was collected.

Knows calls, of which a batch is made up; not where batches come from.
"""
