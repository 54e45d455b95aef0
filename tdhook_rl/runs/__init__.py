"""Single modules of one forward pass: captured, overridden or left early, without a method."""
