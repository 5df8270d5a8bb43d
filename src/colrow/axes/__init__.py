"""Which dimensions belong together: factors, one rule per operator, classes, legality."""
