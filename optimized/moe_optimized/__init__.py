"""Fast versions of the concepts in moe_reference: same names, same signatures, same results."""
