"""One runnable file for each way of use, and the demo."""
