"""Side-by-side measurements; each prints what the README and the closing notes quote."""
